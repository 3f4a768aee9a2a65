"""The bundle against Airflow's own base class and manager."""

import json
import os
from pathlib import Path

import pytest
from airflow.dag_processing.bundles.base import BundleUsageTrackingManager, get_bundle_tracking_dir

from dcswitch_airflow.bundle import ReleaseBundle, ReleaseMissing

ONE = "r000001-aaaaaaaaaaaa"
TWO = "r000002-bbbbbbbbbbbb"


def make(root: Path, version: str) -> None:
    (root / version).mkdir()
    (root / version / "a.py").write_text(f"# {version}\n")


def activate(root: Path, version: str) -> None:
    os.symlink(version, root / ".new")
    os.rename(root / ".new", root / "current")


def text(version) -> str:
    return getattr(version, "version", version)


@pytest.fixture
def releases(tmp_path):
    make(tmp_path, ONE)
    activate(tmp_path, ONE)
    return tmp_path


def bundle(root, **kwargs) -> ReleaseBundle:
    return ReleaseBundle(name="dags", releases_dir=str(root), **kwargs)


def test_the_current_release_is_the_version_and_the_folder(releases):
    it = bundle(releases)
    it.initialize()
    assert text(it.get_current_version()) == ONE
    assert it.path == releases / ONE and (it.path / "a.py").exists()


def test_a_swap_is_seen_at_a_refresh_and_not_before(releases):
    it = bundle(releases)
    it.initialize()
    make(releases, TWO)
    activate(releases, TWO)
    assert it.path == releases / ONE and text(it.get_current_version()) == ONE
    it.refresh()
    assert it.path == releases / TWO and text(it.get_current_version()) == TWO


def test_a_task_reads_the_release_its_run_began_with(releases):
    make(releases, TWO)
    activate(releases, TWO)
    it = bundle(releases, version=ONE)
    it.initialize()
    assert it.path == releases / ONE and text(it.get_current_version()) == ONE
    with pytest.raises(RuntimeError, match="bound to release"):
        it.refresh()


def test_an_unknown_release_is_an_error_that_names_its_serial(releases):
    with pytest.raises(ReleaseMissing, match="DAG release 124 "):
        bundle(releases, version="r000124-cccccccccccc").initialize()


@pytest.mark.parametrize("name", ["../etc", "current", "r1-x", f"{ONE}/..", ".tmp-" + TWO])
def test_a_name_that_is_no_release_is_refused(releases, name):
    with pytest.raises(ReleaseMissing, match="no DAG release"):
        bundle(releases, version=name).initialize()


def test_before_the_first_release_the_error_says_what_to_do(tmp_path):
    with pytest.raises(ReleaseMissing, match="dags publish"):
        bundle(tmp_path).initialize()


def test_a_relative_folder_is_refused():
    with pytest.raises(ValueError, match="not absolute"):
        bundle("releases")


def test_airflows_manager_makes_it_from_its_configuration(releases, monkeypatch):
    from airflow.dag_processing.bundles.manager import DagBundlesManager

    config = [
        {
            "name": "dags",
            "classpath": "dcswitch_airflow.bundle.ReleaseBundle",
            "kwargs": {"releases_dir": str(releases), "refresh_interval": 5},
        }
    ]
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST", json.dumps(config))
    it = DagBundlesManager().get_bundle("dags", version=ONE)
    it.initialize()
    assert it.path == releases / ONE and it.refresh_interval == 5


def test_airflows_cleanup_of_old_versions_leaves_the_release_and_does_not_fail(releases, monkeypatch):
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__STALE_BUNDLE_CLEANUP_MIN_VERSIONS", "0")
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__STALE_BUNDLE_CLEANUP_AGE_THRESHOLD", "1")
    bundle(releases, version=ONE).initialize()
    tracking = get_bundle_tracking_dir("dags")
    tracking.mkdir(parents=True, exist_ok=True)
    (tracking / ONE).write_text("2020-01-01T00:00:00+00:00")
    BundleUsageTrackingManager()._remove_stale_bundle_versions_for_bundle("dags")
    assert not (tracking / ONE).exists()
    assert (releases / ONE / "a.py").exists()
