"""Checks that several rooms of the tests share."""
