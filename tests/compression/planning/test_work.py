"""Progress is the share of the time, whatever a machine's rates are: a run is simulated on a fake clock."""

import itertools

import pytest

import qmoe_jax as qj
from qmoe_jax.compression.planning.costs import ExpertStorage, Kind, TokenCounts
from qmoe_jax.compression.planning.rates import H100
from qmoe_jax.compression.planning.work import TOTAL, Work, WorkTally

MODEL = qj.PRESETS["switch-c-2048"]
TOKENS = TokenCounts(160_000, 82_000_000, 20_000_000)
FACTORS = (0.3, 0.5, 1.0, 2.0, 3.0)
PIECES = 50


def planned(config=None, **options):
    config = config or qj.CompressionConfig()
    return Work.of(MODEL, config, TOKENS, H100, storage=ExpertStorage(4, 256, True), **options)


class Simulation:
    """A run in which each kind of work takes a multiple of the predicted time."""

    def __init__(self, work, factors, units=lambda phase: phase.units):
        self.now, self.calls = 0.0, []
        self.total = sum(
            phase.seconds * units(phase) / phase.units * factors[phase.kind] for phase in work.phases
        )
        self.tally = WorkTally(work, self.hear, lambda: self.now)
        for step, group in itertools.groupby(work.phases, lambda phase: phase.step):
            phases = list(group)
            for experts in (False, True):  # the kinds of the second pass take turns, group after group
                chosen = [p for p in phases if (p.kind is not Kind.ATTENTION) == experts]
                self.tally.begin(step, "experts" if experts else "attention")
                for _, phase in itertools.product(range(PIECES), chosen):
                    piece = units(phase) / PIECES
                    self.now += phase.seconds * piece / phase.units * factors[phase.kind]
                    self.tally.advance(phase.kind, piece)
        self.tally.end()

    def hear(self, done, total, label):
        self.calls.append((self.now, done, total, label))

    def worst(self, start=0.1):
        """The largest error of the time left by anyone's arithmetic, as a share of what is left."""
        errors = [0.0]
        for now, done, total, _ in self.calls:
            if start * self.total <= now < 0.98 * self.total and done:
                guess, left = now * (total - done) / done, self.total - now
                errors.append(abs(guess - left) / left)
        return max(errors)


@pytest.mark.parametrize("seed", range(8))
def test_time_left_is_right_after_a_tenth_whatever_the_rates_are(seed):
    factors = {kind: FACTORS[(seed * (i + 2) + i * i) % 5] for i, kind in enumerate(Kind)}
    run = Simulation(planned(copied_bytes=5e9), factors)
    assert run.worst() < 0.2
    done = [call[1] for call in run.calls]
    assert done == sorted(done) and (done[0], done[-1]) == (0, TOTAL)
    assert {call[2] for call in run.calls} == {TOTAL}


def test_progress_moves_in_every_phase():
    run = Simulation(planned(), dict.fromkeys(Kind, 1.0))
    seen = {}
    for _, done, _, label in run.calls:
        seen.setdefault(label, set()).add(done)
    assert len(seen) == 2 * 30 + 3  # attention and experts of each layer, the encoder's end, nothing begun
    assert all(len(done) > 10 for label, done in seen.items() if "layer" in label)


def test_units_that_were_predicted_wrongly_are_learned_from_the_steps_before():
    half = lambda phase: phase.units * (0.5 if phase.kind is Kind.CALIBRATE else 1)
    assert Simulation(planned(), dict.fromkeys(Kind, 1.0), half).worst() < 0.2


def test_units_of_a_step_can_be_corrected_once_they_are_known():
    work = planned(qj.CompressionConfig(layers="encoder:0", experts="0-15"))
    tally = WorkTally(work, lambda *call: None, lambda: 0.0)
    tally.begin("encoder layer 0", "experts")
    before = tally.seconds_left
    tally.expect(Kind.CALIBRATE, TOKENS.encoder)  # all of them are routed to the selected experts
    assert tally.seconds_left > 2 * before


def test_what_an_earlier_run_has_done_is_not_counted():
    work = planned()
    left = work.remaining({(f"encoder layer {i}", kind): 1.0 for i in range(15) for kind in Kind})
    assert {phase.step for phase in left.phases} == {
        "encoder's end", *(f"decoder layer {i}" for i in range(15))
    }  # fmt: skip
    half = work.remaining({("encoder layer 0", Kind.QUANTIZE): 0.5})
    assert half.phases[2].units == work.phases[2].units / 2 == 1024


def test_hosts_share_the_work():
    one, four = planned(), planned(hosts=4)
    assert four.seconds == pytest.approx(one.seconds / 4)
