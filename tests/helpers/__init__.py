"""Sample data and checks that several tests share."""
