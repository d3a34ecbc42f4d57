from pipeline.serving.traffic import UNDECIDED_SECONDS, Request, Traffic


def test_slots_that_are_missed_and_waited_for():
    traffic = Traffic(max_loras=2)
    assert [traffic.enter(number) for number in (1, 2, 1)] == [(True, False), (True, False), (False, False)]
    assert traffic.enter(3) == (True, True)  # 1 and 2 are running
    traffic.leave(2)
    traffic.leave(3)
    assert traffic.enter(3) == (False, False)
    assert traffic.enter(2) == (True, True)
    assert (traffic.misses, traffic.waits) == (4, 2)


def test_an_adapter_is_meant_by_what_runs_has_chosen_or_may_still_choose():
    traffic = Traffic(max_loras=2)
    assert not traffic.may_mean(1, unnamed_since=100.0, now=101.0)
    traffic.enter(1)
    assert traffic.may_mean(1, 100.0, 101.0) and not traffic.may_mean(2, 100.0, 101.0)
    traffic.leave(1)
    chosen, undecided, later = Request(arrived=99.0, chosen=True, lora_id=1), Request(arrived=99.0), Request(arrived=100.5)
    for request, means_1, means_2 in ((chosen, True, False), (undecided, True, True), (later, False, False)):
        traffic.open(request)
        assert (traffic.may_mean(1, 100.0, 101.0), traffic.may_mean(2, 100.0, 101.0)) == (means_1, means_2)
        traffic.close(request)


def test_a_client_that_never_ends_its_body_holds_nothing_for_ever():
    traffic = Traffic(max_loras=2)
    traffic.open(Request(arrived=0.0))
    assert traffic.may_mean(1, 10.0, 10.0 + UNDECIDED_SECONDS - 1) and not traffic.may_mean(1, 10.0, 10.0 + UNDECIDED_SECONDS + 1)
