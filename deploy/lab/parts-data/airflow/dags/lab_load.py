"""DAGs of the lab: one task of a few seconds each, which marks its start and its end outside every plane.

A mark is one line, appended whole: unix seconds, site, dag, run, task, map index, try, DAG release, start or end, pid.
Runs are asked for from outside. `conf` may carry `seconds`.
"""

from __future__ import annotations

import os
import pathlib
import re
import time
from datetime import datetime, timedelta, timezone

from airflow.sdk import DAG, get_current_context, task


def release() -> int:
    """Serial of the DAG release that this file came from; 0 when it came from none."""
    for part in reversed(pathlib.Path(__file__).resolve().parts):
        if found := re.fullmatch(r"r(\d{6,})-[0-9a-f]{12}", part):
            return int(found.group(1))
    return 0


def mark(phase: str) -> None:
    """Appends one mark; fails the task when it cannot."""
    ti = get_current_context()["ti"]
    index = -1 if ti.map_index is None else ti.map_index
    words = (f"{time.time():.6f}", os.environ["DC_SITE"], ti.dag_id, ti.run_id, ti.task_id, index, ti.try_number,
             release(), phase, os.getpid())
    line = "\t".join(str(word) for word in words) + "\n"
    file = os.open(os.environ["DC_MARKS_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def make(dag_id: str, policy: str, retries: int, seconds: float) -> DAG:
    """One DAG of one task."""
    with DAG(
        dag_id=dag_id,
        schedule=None,
        start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
        catchup=False,
        is_paused_upon_creation=False,
        max_active_runs=16,
        tags=[f"dr:{policy}"],
        default_args={"retries": retries, "retry_delay": timedelta(seconds=2)},
    ) as dag:

        @task
        def work() -> None:
            mark("start")
            conf = get_current_context()["dag_run"].conf or {}
            until = time.monotonic() + float(conf.get("seconds", seconds))
            while time.monotonic() < until:
                time.sleep(0.1)
            print("worked")
            mark("end")

        work()
    return dag


lab_rerun = make("lab_rerun", "rerun", 1, 3)
lab_fail = make("lab_fail", "fail", 0, 30)
lab_hold = make("lab_hold", "hold", 0, 30)
