"""Starts Airflow's processes from one warm interpreter, behind a gate.

    python -m dcswitch_airflow.boot {api|writers} --socket PATH

The master imports everything that takes seconds, connects to no database, and waits. Its parts
(`api`: the API server; `writers`: scheduler, dag processor, triggerer) are forked when a message
that names its authority opens the gate. The gate is in memory only: a restarted master is closed,
whatever files lie about. One JSON object per line over the socket (mode 0600), one answer:

    > {"do":"status"}
    > {"do":"open","by":{"origin":"step","epoch":"0.3","token":41}}     or reopen; standby: api only
    > {"do":"open","by":{...},"parts":["scheduler"]}    these first; what is missing follows when asked again
    > {"do":"close","grace_ms":1000}          api only: ends its part, keeps what is imported
    > {"do":"facts","nonce":"..."}            what `facts` prints, as this very process has it
    > {"do":"logs"}                           how many task logs wait on disk
    < {"role":"writers","state":"closed|open|draining","by":null,"parts":{"scheduler":72},
       "open_ms":1200,"pid":70}
    < {"error":"..."}

SIGTERM drains: the scheduler first, without limit, as it waits for its running tasks; then the
others; then the master ends. Whoever wants a limit kills the unit. A part that ends by itself
takes the whole unit down, so that nobody mistakes half a unit for a whole one.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback

from dcswitch_airflow import facts, logs

PARTS = {"api": ("api",), "writers": ("scheduler", "dag-processor", "triggerer")}
# the scheduler waits for its tasks, and those report through whatever else still runs
STOP_ORDER = ("scheduler", "triggerer", "dag-processor", "api")
ARGV = {
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
}
HELPER_STOP_S = 5.0
REQUEST_MAX = 4096
STARTED = time.monotonic()


def say(*words) -> None:
    """One line for the unit's log."""
    print(f"boot {time.monotonic() - STARTED:8.2f}", *words, file=sys.stderr, flush=True)


def warm_api() -> None:
    """Imports the API server and builds what it would build at its first requests."""
    import asyncio

    os.environ["AIRFLOW_API_APPS"] = "all"
    from airflow.api_fastapi.auth.tokens import get_signing_args

    get_signing_args()
    import uvicorn  # noqa: F401
    import uvicorn.lifespan.on  # noqa: F401
    import uvicorn.loops.auto  # noqa: F401
    import uvicorn.protocols.http.auto  # noqa: F401
    from airflow.api_fastapi.main import app

    async def ask(path: str) -> int:
        seen = []

        async def send(message):
            if message["type"] == "http.response.start":
                seen.append(message["status"])

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": "GET", "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "headers": [(b"host", b"warm")], "client": ("warm", 1), "server": ("warm", 80),
        }
        await app(scope, receive, send)
        return seen[0] if seen else 0

    async def first_requests() -> None:
        # no database is needed for these; the second builds every version of the task API
        for path in ("/api/v2/version", "/execution/health"):
            say("warmed", path, await ask(path))

    try:
        asyncio.run(first_requests())
    except Exception as cause:  # a cold first request is slow, not wrong
        say("not warmed:", repr(cause))


def warm_writers():
    """Imports scheduler, executor, dag processor, triggerer and what tasks need; returns the parser."""
    from airflow.cli.cli_parser import get_parser
    import airflow.cli.commands.dag_processor_command  # noqa: F401
    import airflow.cli.commands.scheduler_command  # noqa: F401
    import airflow.cli.commands.triggerer_command  # noqa: F401
    import airflow.dag_processing.manager  # noqa: F401
    import airflow.dag_processing.processor  # noqa: F401
    import airflow.api_fastapi.auth.tokens  # noqa: F401
    import airflow.api_fastapi.execution_api.app  # noqa: F401
    import airflow.callbacks.database_callback_sink  # noqa: F401
    import airflow.executors.local_executor  # noqa: F401
    import airflow.sdk.execution_time.supervisor  # noqa: F401
    import airflow.sdk.execution_time.task_runner  # noqa: F401
    import airflow.utils.serve_logs  # noqa: F401
    import psycopg2  # noqa: F401
    from airflow import models
    from airflow.logging_config import get_remote_task_log
    from airflow.providers_manager import ProvidersManager
    from airflow.utils.providers_configuration_loader import providers_configuration_loaded
    from sqlalchemy.orm import configure_mappers

    providers_configuration_loaded(lambda: None)()
    ProvidersManager().initialize_providers_hooks()
    get_remote_task_log()
    models.import_all_models()
    configure_mappers()
    parser = get_parser()
    for argv in ARGV.values():
        parser.parse_args(argv)
    return parser


def serve_api() -> None:
    """Serves until told to end; requests under way get one second."""
    import uvicorn
    from airflow.api_fastapi.main import app
    from airflow.configuration import conf

    def optional(key: str):
        return conf.get("api", key, fallback=None) or None

    uvicorn.run(
        app,
        host=conf.get("api", "host"),
        port=conf.getint("api", "port"),
        timeout_graceful_shutdown=1,
        ssl_certfile=optional("ssl_cert"),
        ssl_keyfile=optional("ssl_key"),
        log_config=None,
        access_log=False,
        log_level=conf.get("logging", "uvicorn_logging_level", fallback="info").lower(),
    )


class Master:
    """The one interpreter and its parts."""

    def __init__(self, role: str, listener: socket.socket, parser) -> None:
        self.role, self.listener, self.parser = role, listener, parser
        self.state, self.by, self.token = "closed", None, -1
        self.opened = 0.0
        self.parts: dict[str, int] = {}
        self.stopping = False
        self.code = 0

    def status(self) -> dict:
        """What stands."""
        since = None if self.state != "open" else int((time.monotonic() - self.opened) * 1000)
        return {
            "role": self.role, "state": self.state, "by": self.by, "parts": self.parts,
            "open_ms": since, "pid": os.getpid(),
        }

    def spawn(self, name: str) -> None:
        """Forks one part."""
        pid = os.fork()
        if pid:
            self.parts[name] = pid
            say("forked", name, pid)
            return
        code = 1
        try:
            self.listener.close()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            if name == "api":
                serve_api()
            else:
                sys.argv = ["airflow", *ARGV[name]]
                args = self.parser.parse_args(ARGV[name])
                args.func(args)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def open(self, by, parts) -> None:
        """Opens the gate for a named authority and starts those parts that do not run."""
        origins = ("step", "reopen", "standby") if self.role == "api" else ("step", "reopen")
        if not isinstance(by, dict) or by.get("origin") not in origins or not by.get("epoch"):
            raise ValueError(f"the gate opens only to {' or '.join(origins)} that names its epoch")
        token = by.get("token", -1)
        if not isinstance(token, int) or (by["origin"] == "step" and token < self.token):
            raise ValueError(f"token {token} is older than {self.token}")
        if self.state == "draining":
            raise ValueError("this unit drains; start a new one")
        if unknown := set(parts) - set(PARTS[self.role]):
            raise ValueError(f"no parts {sorted(unknown)}")
        if self.state != "open":
            self.opened = time.monotonic()
        self.token, self.by, self.state = max(token, self.token), by, "open"
        if threading.active_count() != 1:
            say("threads before the fork:", [thread.name for thread in threading.enumerate()])
        for name in parts:
            if name not in self.parts:
                self.spawn(name)

    def close(self, grace_s: float) -> None:
        """Ends the parts of an API master, which stays warm."""
        if self.role != "api":
            raise ValueError("writers are stopped as a whole: a drained scheduler is not opened again")
        self.end_part("api", grace_s)
        if self.state == "open":
            self.state, self.by = "closed", None

    def end_part(self, name: str, grace_s: float | None) -> None:
        """TERM, then KILL when a limit is given and passed; returns once the part is reaped."""
        pid = self.parts.get(name)
        if pid is None:
            return
        began = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG if grace_s is not None else 0)
            if done:
                break
            if time.monotonic() - began > grace_s:
                os.kill(pid, signal.SIGKILL)
                grace_s = None
            else:
                time.sleep(0.01)
        self.parts.pop(name)
        say("ended", name, pid, f"{time.monotonic() - began:.2f} s", os.waitstatus_to_exitcode(status))

    def reap(self) -> None:
        """Notices parts that ended by themselves."""
        for name, pid in list(self.parts.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.parts.pop(name)
                self.code = 1
                self.stopping = True
                say(name, pid, "ended by itself with", os.waitstatus_to_exitcode(status), "- the unit ends")

    def drain(self) -> None:
        """Ends everything, the scheduler first and without limit, still answering what stands."""
        self.state = "draining"
        scheduler = self.parts.get("scheduler")
        if scheduler is not None:
            os.kill(scheduler, signal.SIGTERM)
            say("scheduler drains")
            while "scheduler" in self.parts:
                self.turn(0.2)
                self.reap_one("scheduler")
        for name in STOP_ORDER:
            self.end_part(name, HELPER_STOP_S)

    def reap_one(self, name: str) -> None:
        """Takes the end of one part that was told to end."""
        done, status = os.waitpid(self.parts[name], os.WNOHANG)
        if done:
            say("ended", name, self.parts.pop(name), os.waitstatus_to_exitcode(status))

    def answer(self, line: bytes) -> dict:
        """One request."""
        try:
            request = json.loads(line)
            match request["do"]:
                case "status":
                    pass
                case "open":
                    self.open(request["by"], request.get("parts", PARTS[self.role]))
                case "close":
                    self.close(request["grace_ms"] / 1000)
                case "facts":
                    return facts.collect(request["nonce"])
                case "logs":
                    return {"waiting": len(logs.waiting(logs.base()))}
                case other:
                    raise ValueError(f"no request {other!r}")
        except (ValueError, KeyError, TypeError, OSError) as cause:
            return {"error": f"{type(cause).__name__}: {cause}"}
        return self.status()

    def turn(self, wait_s: float) -> None:
        """Waits for a request or a signal, and answers the request."""
        ready, _, _ = select.select([self.listener, WAKE_READ], [], [], wait_s)
        if WAKE_READ in ready:
            try:
                os.read(WAKE_READ, 512)
            except BlockingIOError:
                pass
        if self.listener not in ready:
            return
        asker, _ = self.listener.accept()
        with asker:
            asker.settimeout(2)
            try:
                with asker.makefile("rwb") as stream:
                    answer = self.answer(stream.readline(REQUEST_MAX))
                    stream.write(json.dumps(answer).encode() + b"\n")
            except OSError as cause:
                if cause.errno not in (errno.EPIPE, errno.ECONNRESET, None):
                    say("answer:", cause)

    def run(self) -> int:
        """Until told to end, or a part ends by itself."""
        while not self.stopping and not TOLD_TO_END:
            self.turn(1.0)
            self.reap()
        self.drain()
        say("end")
        return self.code


TOLD_TO_END: list[int] = []
WAKE_READ, WAKE_WRITE = os.pipe()


def listen(path: str) -> socket.socket:
    """The gate's socket; what an earlier master left is replaced."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(8)
    return listener


def main() -> int:
    """Warms up, then serves the gate."""
    parser = argparse.ArgumentParser(prog="dcswitch_airflow.boot")
    parser.add_argument("role", choices=sorted(PARTS))
    parser.add_argument("--socket", required=True)
    args = parser.parse_args()
    os.environ["_AIRFLOW_PROCESS_CONTEXT"] = "server"
    commands = None
    facts.heads()
    if args.role == "api":
        warm_api()
    else:
        commands = warm_writers()
    os.set_blocking(WAKE_READ, False)
    os.set_blocking(WAKE_WRITE, False)
    signal.set_wakeup_fd(WAKE_WRITE, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: TOLD_TO_END.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    gc.collect()
    gc.freeze()
    master = Master(args.role, listen(args.socket), commands)
    say(args.role, "warm, gate closed, pid", os.getpid())
    return master.run()


if __name__ == "__main__":
    sys.exit(main())
