"""DAG releases as an Airflow DAG bundle.

The agent of a site materialises every release in a folder of its own, ``r000123-ab12cd34ef56``, and swaps the
link ``current`` by rename. The folder's name is the bundle version: Airflow stores it with each DagRun, so the
replicated database itself names the releases that the other site must hold. Nothing here asks a network, and
nothing here changes a release.

    [dag_processor]
    dag_bundle_config_list = [{"name": "dags",
        "classpath": "dcswitch_airflow.bundle.ReleaseBundle",
        "kwargs": {"releases_dir": "/var/lib/dc-switch/releases", "refresh_interval": 5}}]
"""

from __future__ import annotations

import re
from pathlib import Path

from airflow.dag_processing.bundles.base import BaseDagBundle

try:  # Airflow from 3.3 on wants the version wrapped
    from airflow.dag_processing.bundles.base import BundleVersion
except ImportError:  # pragma: no cover - older 3.x takes the text itself
    BundleVersion = None

_VERSION = re.compile(r"r([0-9]{6,})-[0-9a-f]{12}")


class ReleaseMissing(RuntimeError):
    """A DAG release is not on this host's disk."""


class ReleaseBundle(BaseDagBundle):
    """The releases of one group on this host.

    :param releases_dir: the agent's folder of releases, ``[s3] releases_dir`` in its file
    """

    supports_versioning = True

    def __init__(self, *, releases_dir: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self._dir = Path(releases_dir)
        if not self._dir.is_absolute():
            raise ValueError(f"releases_dir {releases_dir!r} is not absolute")
        self._seen: str | None = None

    def initialize(self) -> None:
        """Finds the release that was asked for, or the current one.

        A version that is not on disk is an error that names its serial: the agent brings every release as it is
        published, so either the agent does not run or the release was lost with the other site.
        """
        if self.version:
            self._folder(self.version)
            # Airflow's cleanup of unused versions removes this folder and fails where there is none; the
            # release itself is the agent's
            (self.versions_dir / self.version).mkdir(parents=True, exist_ok=True)
        else:
            self._seen = self._current()
        super().initialize()

    @property
    def path(self) -> Path:
        """The folder of the release; it never changes under its reader."""
        if self.version:
            return self._folder(self.version)
        if self._seen is None:
            self._seen = self._current()
        return self._dir / self._seen

    def get_current_version(self):
        """The release's name, as in ``r000123-ab12cd34ef56``."""
        name = self.version or self._seen or self._current()
        return BundleVersion(version=name) if BundleVersion else name

    def refresh(self) -> None:
        """Turns to the release that is current now."""
        if self.version:
            raise RuntimeError(f"{self.name} is bound to release {self.version} and cannot be refreshed")
        self._seen = self._current()

    def _current(self) -> str:
        link = self._dir / "current"
        try:
            name = link.readlink().name
        except FileNotFoundError:
            raise ReleaseMissing(
                f"no DAG release is active here: {link} does not exist; publish one with `dc-switch dags publish DIR`"
            ) from None
        self._folder(name)
        return name

    def _folder(self, version: str) -> Path:
        found = _VERSION.fullmatch(version)
        if not found:
            raise ReleaseMissing(f"{version!r} is no DAG release; a name is written as r000123-ab12cd34ef56")
        folder = self._dir / version
        if not folder.is_dir():
            raise ReleaseMissing(
                f"DAG release {int(found.group(1))} ({version}) is not on this host: {folder} does not exist; "
                "the site's agent brings every release of the group, see its status"
            )
        return folder
