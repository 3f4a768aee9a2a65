"""The canary of dc-switch: one run after each move shows that scheduler, executor and task API work together.

Publish it with your DAGs. It has no schedule, touches nothing and takes a second.
"""

from datetime import datetime, timezone

from airflow.sdk import DAG, task

with DAG(
    dag_id="dc_switch_canary",
    schedule=None,
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
    is_paused_upon_creation=False,
    tags=["dr:rerun", "dc-switch"],
    default_args={"retries": 1},
):

    @task
    def answer() -> str:
        return "here"

    answer()
