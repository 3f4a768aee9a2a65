"""The gate of a unit, with parts that are no Airflow."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest

STEP = {"origin": "step", "epoch": "0.3", "token": 41}
FAKE = """
    import sys, time
    from dcswitch_airflow import boot, facts
    facts.heads = lambda: ()
    boot.warm_api = lambda: None
    boot.warm_writers = lambda: None
    def part(self, name):
        import os, signal
        pid = os.fork()
        if pid:
            self.parts[name] = pid
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end = lambda *_: (time.sleep(0.5 if name == "scheduler" else 0), os._exit(0))
        signal.signal(signal.SIGTERM, end)
        while True:
            time.sleep(60)
    boot.Master.spawn = part
    sys.argv = ["boot", *sys.argv[1:]]
    sys.exit(boot.main())
"""


class Unit:
    def __init__(self, folder, role):
        self.path = str(folder / "gate")
        command = [sys.executable, "-c", textwrap.dedent(FAKE), role, "--socket", self.path]
        self.process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 20
        while not os.path.exists(self.path):
            assert time.monotonic() < deadline, "the gate never answered"
            time.sleep(0.02)

    def ask(self, request):
        text = request if isinstance(request, str) else json.dumps(request)
        with socket.socket(socket.AF_UNIX) as gate:
            gate.connect(self.path)
            gate.sendall(text.encode() + b"\n")
            return json.loads(gate.makefile().readline())


@pytest.fixture
def start(tmp_path):
    units = []

    def make(role):
        units.append(Unit(tmp_path, role))
        return units[-1]

    yield make
    for unit in units:
        try:
            os.killpg(unit.process.pid, 9)  # its parts with it
        except ProcessLookupError:
            pass
        unit.process.wait()


def test_a_started_unit_is_closed_and_a_socket_left_behind_opens_nothing(start, tmp_path):
    (tmp_path / "gate").touch()
    os.unlink(tmp_path / "gate")
    unit = start("writers")
    seen = unit.ask({"do": "status"})
    assert (seen["state"], seen["parts"], seen["open_ms"]) == ("closed", {}, None)
    assert os.stat(unit.path).st_mode & 0o077 == 0


def test_the_gate_opens_only_to_a_named_authority(start):
    unit = start("writers")
    for by in (None, {}, {"origin": "step"}, {"origin": "self_fence", "epoch": "1"}, {"origin": "standby", "epoch": "1"}):
        assert "error" in unit.ask({"do": "open", "by": by}), by
    assert "error" in unit.ask("nonsense")
    assert "error" in unit.ask({"do": "open", "by": STEP, "parts": ["webserver"]})
    assert unit.ask({"do": "status"})["state"] == "closed"
    assert unit.ask({"do": "open", "by": STEP})["state"] == "open"


def test_the_scheduler_can_come_first_and_the_rest_follows(start):
    unit = start("writers")
    first = unit.ask({"do": "open", "by": STEP, "parts": ["scheduler"]})["parts"]
    whole = unit.ask({"do": "open", "by": STEP})["parts"]
    assert list(first) == ["scheduler"] and whole["scheduler"] == first["scheduler"]
    assert sorted(whole) == ["dag-processor", "scheduler", "triggerer"]


def test_an_older_token_is_refused(start):
    unit = start("api")
    assert unit.ask({"do": "open", "by": STEP})["state"] == "open"
    assert unit.ask({"do": "close", "grace_ms": 2000})["state"] == "closed"
    assert "older" in unit.ask({"do": "open", "by": {**STEP, "token": 40}})["error"]
    assert unit.ask({"do": "open", "by": {**STEP, "token": 42}})["state"] == "open"


def test_closing_the_api_leaves_no_part_and_writers_cannot_be_closed(start):
    api = start("api")
    pid = api.ask({"do": "open", "by": STEP})["parts"]["api"]
    assert api.ask({"do": "close", "grace_ms": 2000})["parts"] == {}
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_writers_are_not_closed_but_drained_and_the_gate_answers_meanwhile(start):
    unit = start("writers")
    unit.ask({"do": "open", "by": STEP})
    assert "error" in unit.ask({"do": "close", "grace_ms": 1})
    unit.process.terminate()
    until = time.monotonic() + 10  # the signal is on its way
    while unit.ask({"do": "status"})["state"] == "open" and time.monotonic() < until:
        time.sleep(0.01)
    assert unit.ask({"do": "status"})["state"] == "draining"
    assert "drains" in unit.ask({"do": "open", "by": STEP})["error"]
    assert unit.process.wait(timeout=10) == 0


def test_a_part_that_ends_by_itself_takes_the_unit_down(start):
    unit = start("writers")
    parts = unit.ask({"do": "open", "by": STEP})["parts"]
    os.kill(parts["triggerer"], 9)
    assert unit.process.wait(timeout=10) == 1
    for pid in parts.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
