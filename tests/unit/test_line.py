"""The direct line: what goes in comes out, a fault is told, and a late answer is never taken for a later one."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.actors import line as line_module
from esper_ray.actors.line import Address, Line, LineAnswer, LineServer, pack, unpack
from esper_ray.errors import EnvironmentFault, EsperError, RunError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="abstract sockets are Linux's")


def line_to(server: LineServer) -> Line:
    assert server.address is not None
    return Line(server.address)


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_parts_come_back_as_they_were(parts: list[bytes]):
    assert unpack(pack(parts)) == parts


def test_an_answer_is_that_of_the_request_and_callers_do_not_mix():
    server = LineServer("test", lambda parts: [part[::-1] for part in parts])
    lines = [line_to(server), line_to(server)]
    answers = [line.call([name, b"", b"abc"]) for line, name in zip(lines, (b"first", b"second"), strict=True)]
    assert [answer.wait(10.0) for answer in answers] == [[b"tsrif", b"", b"cba"], [b"dnoces", b"", b"cba"]]


@pytest.mark.parametrize("fault", [RunError("It is not known.", remedy="Open it."), KeyError("a bug of ours")])
def test_the_other_ends_fault_is_the_callers_and_the_line_stays_good(fault):
    def serve(parts: list[bytes]) -> Sequence[bytes]:
        if parts == [b"bad"]:
            raise fault
        return parts

    line = line_to(LineServer("test", serve))
    with pytest.raises(EsperError, match=r"It is not known\. Open it\.|a bug of ours"):
        line.call([b"bad"]).wait(10.0)
    assert line.call([b"good"]).wait(10.0) == [b"good"]


def test_an_answer_that_comes_late_is_thrown_away():
    go = threading.Event()

    def serve(parts: list[bytes]) -> Sequence[bytes]:
        if parts == [b"slow"]:
            go.wait(10.0)
        return parts

    line = line_to(LineServer("test", serve))
    assert line.call([b"slow"]).wait(0.0) is None
    go.set()
    assert line.call([b"quick"]).wait(10.0) == [b"quick"]


def test_answers_may_be_waited_for_in_any_order_and_the_oldest_that_nobody_wants_are_forgotten(monkeypatch):
    monkeypatch.setattr(line_module, "_MOST_UNCALLED_FOR", 4)
    line = line_to(LineServer("test", lambda parts: parts))
    first, second, third = (line.call([name]) for name in (b"1", b"2", b"3"))
    assert [each.wait(10.0) for each in (third, first, second)] == [[b"3"], [b"1"], [b"2"]]
    forgotten, *others = (line.call([b"%d" % number]) for number in range(5))
    assert [each.wait(10.0) for each in reversed(others)] == [[b"4"], [b"3"], [b"2"], [b"1"]]
    assert forgotten.wait(0.01) is None


def test_who_does_not_know_the_key_or_is_on_another_machine_is_not_let_in():
    server = LineServer("test", lambda parts: parts)
    assert server.address is not None
    for wrong in (
        Address(socket.gethostname(), server.address.name, b"another key"),
        Address("elsewhere", server.address.name, server.address.key),
        Address(socket.gethostname(), "\0esper-nobody", server.address.key),
    ):
        with pytest.raises(OSError):
            Line(wrong)
    assert line_to(server).call([b"still there"]).wait(10.0) == [b"still there"]


def test_a_broken_line_is_a_fault_not_a_silence():
    gone = threading.Event()

    def serve(parts: list[bytes]) -> Sequence[bytes]:
        gone.set()
        raise EOFError

    line = line_to(LineServer("test", serve))
    answer = line.call([b"x"])
    assert gone.wait(10.0)
    with pytest.raises(EsperError):
        answer.wait(10.0)
    line.close()
    with pytest.raises(OSError):
        line.call([b"y"])
    with pytest.raises(EnvironmentFault):
        answer.wait(0.0)


def test_a_request_that_cannot_be_read_ends_its_own_connection_only():
    server = LineServer("test", lambda parts: parts)
    broken, good = line_to(server), line_to(server)
    broken._connection.send_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(EnvironmentFault):
        LineAnswer(broken, b"1").wait(10.0)
    assert good.call([b"x"]).wait(10.0) == [b"x"]
