import enum


class Kind(enum.Enum):
    ATTENTION = "a"
    CALIBRATE = "c"
    QUANTIZE = "q"
    FORWARD = "f"


class WorkTally:
    def __init__(self, progress):
        self.p = progress
        self.l = ""
        self.n = 0
        progress(0, 100, "")

    def begin(self, label):
        self.l = label
        self.p(min(self.n, 99), 100, label)

    def advance(self, kind, amount):
        self.p(min(self.n, 99), 100, self.l)

    def end(self):
        self.p(100, 100, self.l)
