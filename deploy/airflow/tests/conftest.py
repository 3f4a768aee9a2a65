"""A home of its own for Airflow, before it is imported."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="dcswitch-airflow-")
os.environ.setdefault("AIRFLOW_HOME", _HOME.name)
os.environ["AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH"] = os.path.join(_HOME.name, "bundles")
