from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gpu_prefill.schedule import MAX_REMEMBERED_TICKETS, ExportSchedule, StepPlan
from tests.gpu_prefill.recorder import make_ticket
from transfer.messages import Landing, Ticket


def params(ticket: Ticket) -> dict[str, object]:
    return {"isthmus": msgspec.to_builtins(ticket), "other": 1}


def ranges(plan: StepPlan) -> list[tuple[str, int, int, tuple[int, ...]]]:
    return [(job.ticket[-1], job.start, job.end, job.block_ids) for job in plan.jobs]


@pytest.fixture
def schedule() -> ExportSchedule:
    return ExportSchedule(max_backlog_bytes=1000)


def test_a_prompt_leaves_step_by_step_and_ends_with_its_last_token(schedule: ExportSchedule) -> None:
    ticket = make_ticket(1)
    schedule.admit("r", params(ticket), 300)
    schedule.place("r", [7, 8])
    first = schedule.plan({"r": 256}, computes=True)
    schedule.extend("r", [9])
    second = schedule.plan({"r": 300}, computes=True)
    third = schedule.plan({"r": 301}, computes=True)

    assert first.opened == [ticket]
    assert ranges(first) == [("1", 0, 256, (7, 8))]
    assert not first.ended
    assert ranges(second) == [("1", 256, 300, (7, 8, 9))]
    assert second.ended == {ticket.ticket: 300}
    assert not second.opened
    assert third == StepPlan()
    assert schedule.finish("r", prefilled=True) == {"isthmus": {"exported_tokens": 300, "complete": True}}
    assert len(schedule) == 0


@pytest.mark.parametrize("computed_before", [0, 256])
def test_the_first_step_starts_at_reused_tokens_whatever_the_prefix_cache_held(
    schedule: ExportSchedule, computed_before: int
) -> None:
    schedule.admit("r", params(make_ticket(1, reused_tokens=100)), 300)
    schedule.place("r", [1, 2, 3])
    plan = schedule.plan({"r": computed_before + 44}, computes=True)

    assert [(job.start, job.end) for job in plan.jobs] == ([] if not computed_before else [(100, 300)])
    assert list(plan.ended.values()) == ([300] if computed_before else [])


def test_a_prompt_that_is_reused_whole_ends_without_a_chunk(schedule: ExportSchedule) -> None:
    ticket = make_ticket(1, reused_tokens=50)
    schedule.admit("r", params(ticket), 50)
    schedule.place("r", [1])
    plan = schedule.plan({"r": 50}, computes=True)

    assert plan.opened == [ticket]
    assert not plan.jobs
    assert plan.ended == {ticket.ticket: 50}


def test_a_preempted_request_exports_no_token_twice_and_reads_its_new_blocks(schedule: ExportSchedule) -> None:
    schedule.admit("r", params(make_ticket(1)), 300)
    schedule.place("r", [1, 2])
    schedule.plan({"r": 200}, computes=True)
    schedule.plan({}, computes=True)
    schedule.place("r", [5, 6])
    again = schedule.plan({"r": 150}, computes=True)
    schedule.extend("r", [7])
    rest = schedule.plan({"r": 300}, computes=True)

    assert not again.jobs
    assert ranges(rest) == [("1", 200, 300, (5, 6, 7))]


def test_generated_tokens_are_not_exported(schedule: ExportSchedule) -> None:
    schedule.admit("r", params(make_ticket(1)), 10)
    schedule.place("r", [1])
    assert [(job.start, job.end) for job in schedule.plan({"r": 14}, computes=True).jobs] == [(0, 10)]


def test_requests_without_a_ticket_are_none_of_our_business(schedule: ExportSchedule) -> None:
    schedule.admit("a", None, 10)
    schedule.admit("b", {"other": 1}, 10)
    schedule.report(backlog_bytes=900, failed={})
    assert not schedule.must_wait("a")
    assert schedule.plan({"a": 10, "b": 10}, computes=True) == StepPlan()
    assert schedule.finish("a", prefilled=True) is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ticket": "xyz"}, "not a ticket"),
        ({"ticket": "ab"}, "32 hex digits"),
        ({"chunk_tokens": 0}, "chunk_tokens must be"),
        ({"reused_tokens": 11}, r"reused_tokens must lie in 0\.\.10"),
        ({"reused_tokens": -1}, "reused_tokens must lie"),
        ({"codec": "zip"}, "unknown codec 'zip'"),
        ({"landing": None}, r"landing"),
    ],
)
def test_a_malformed_ticket_is_refused_by_field(
    schedule: ExportSchedule, change: dict[str, Any], complaint: str
) -> None:
    body = msgspec.to_builtins(make_ticket(1)) | change
    schedule.admit("r", {"isthmus": body}, 10)
    schedule.place("r", [1])
    assert schedule.plan({"r": 10}, computes=True) == StepPlan()
    result = schedule.finish("r", prefilled=True)
    assert result is not None
    with pytest.raises(AssertionError, match=complaint):
        raise AssertionError(result["isthmus"])
    assert len(schedule) == 0


def test_a_ticket_serves_one_request_even_after_that_has_left(schedule: ExportSchedule) -> None:
    schedule.admit("a", params(make_ticket(1)), 10)
    schedule.admit("b", params(make_ticket(1)), 10)
    schedule.finish("a", prefilled=True)
    schedule.admit("c", params(make_ticket(1)), 10)
    for request_id in "bc":
        result = schedule.finish(request_id, prefilled=True)
        assert result is not None
        assert "used before" in str(result["isthmus"])


def test_memory_of_tickets_is_bounded(schedule: ExportSchedule) -> None:
    for number in range(MAX_REMEMBERED_TICKETS + 10):
        schedule.admit("r", params(make_ticket(number)), 10)
        schedule.finish("r", prefilled=True)
    assert len(schedule._remembered) == MAX_REMEMBERED_TICKETS
    assert len(schedule) == 0


def test_an_aborted_request_aborts_its_transfer_in_the_next_step_once(schedule: ExportSchedule) -> None:
    ticket = make_ticket(1)
    schedule.admit("r", params(ticket), 300)
    schedule.place("r", [1, 2])
    schedule.plan({"r": 100}, computes=True)
    result = schedule.finish("r", prefilled=False)

    assert result == {"isthmus": {"exported_tokens": 100, "complete": False, "error": "prefill was aborted"}}
    assert schedule.plan({}, computes=False).aborted == {ticket.ticket: "prefill was aborted"}
    assert not schedule.plan({}, computes=False).aborted


def test_a_failure_that_the_worker_reports_stops_that_export_only(schedule: ExportSchedule) -> None:
    bad, good = make_ticket(1), make_ticket(2)
    for request_id, ticket in (("bad", bad), ("good", good)):
        schedule.admit(request_id, params(ticket), 300)
        schedule.place(request_id, [1, 2, 3])
    schedule.plan({"bad": 100, "good": 100}, computes=True)
    schedule.report(backlog_bytes=0, failed={bad.ticket: "link is down", "0" * 32: "unknown"})
    plan = schedule.plan({"bad": 300, "good": 300}, computes=True)

    assert ranges(plan) == [("2", 100, 300, (1, 2, 3))]
    # Other ranks have not failed and must not go on.
    assert plan.aborted == {bad.ticket: "link is down"}
    assert schedule.finish("bad", prefilled=True) == {
        "isthmus": {"exported_tokens": 100, "complete": False, "error": "link is down"}
    }
    assert not schedule.plan({}, computes=False).aborted


def test_back_pressure_begins_over_half_the_limit_and_idles_only_empty_steps(schedule: ExportSchedule) -> None:
    schedule.admit("r", params(make_ticket(1)), 10)
    schedule.report(backlog_bytes=500, failed={})
    assert not schedule.must_wait("r")
    schedule.report(backlog_bytes=501, failed={})
    assert schedule.must_wait("r")
    assert schedule.plan({}, computes=False).idle
    assert schedule.must_wait("r")
    assert not schedule.plan({}, computes=True).idle
    assert not schedule.plan({}, computes=False).idle


def test_k_is_reordered_as_the_landing_wants(schedule: ExportSchedule) -> None:
    landing = Landing(cell_type="f16", rope_order="interleaved")
    schedule.admit("a", params(make_ticket(1, landing=landing)), 10)
    schedule.admit("b", params(make_ticket(2)), 10)
    assert [job.interleave for job in schedule.plan({"a": 10, "b": 10}, computes=True).jobs] == [True, False]
