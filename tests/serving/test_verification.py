import math

import pytest

from pipeline.errors import VersionRefused
from pipeline.serving.engine import Mapping
from pipeline.serving.verification import apart, verify

BASE, NEW, OTHER = (-1.0, -2.0, -3.0), (-1.5, -2.0, -3.0), (-4.0, -5.0, -6.0)
ALL = Mapping(8, ())


def moved(fingerprint, by):
    return (fingerprint[0] + by, *fingerprint[1:])


def test_what_was_seen():
    seen = verify(NEW, (BASE, moved(BASE, 1e-6)), {"catalog/1": (OTHER, moved(OTHER, 1e-5))}, ALL, float32=True)
    assert (seen.differs_by, seen.modules) == (pytest.approx(0.5, abs=1e-5), 8)
    assert seen.noise == pytest.approx(1e-6) and seen.others_moved_by == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("new", "base_now", "other_now", "mapping", "float32", "code"),
    [
        (NEW, BASE, OTHER, Mapping(0, ("a",)), True, "keys-match-nothing"),
        (NEW, BASE, OTHER, Mapping(7, ("a",)), True, "keys-unmatched"),
        ((math.nan, -2.0, -3.0), BASE, OTHER, ALL, True, "not-finite"),
        (BASE, BASE, OTHER, ALL, True, "no-effect"),
        (moved(BASE, 0.0009), moved(BASE, 0.0008), OTHER, ALL, True, "no-effect"),  # within the replica's own noise
        (moved(BASE, 0.1), moved(BASE, 0.12), OTHER, ALL, False, "no-effect"),
        (NEW, moved(BASE, 0.002), OTHER, ALL, True, "disturbs-others"),
        (NEW, BASE, moved(OTHER, 0.002), ALL, True, "disturbs-others"),
        (NEW, BASE, moved(OTHER, 0.2), ALL, False, "disturbs-others"),
        (NEW, BASE, (math.nan, -5.0, -6.0), ALL, False, "disturbs-others"),
    ],
)
def test_refused(new, base_now, other_now, mapping, float32, code):
    with pytest.raises(VersionRefused) as refused:
        verify(new, (BASE, base_now), {"catalog/1": (OTHER, other_now)}, mapping, float32)
    assert refused.value.code == code


def test_bfloat16_takes_more_noise():
    assert verify((-9.0, -2.0, -3.0), (BASE, moved(BASE, 0.1)), {"catalog/1": (OTHER, moved(OTHER, 0.1))}, ALL, float32=False)


def test_apart():
    assert apart((-1.0, -math.inf), (-1.25, -math.inf)) == 0.25
    assert apart((), ()) == apart((1.0,), (1.0, 2.0)) == apart((math.nan,), (1.0,)) == math.inf
