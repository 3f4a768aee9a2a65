"""Uploads the logs of finished attempts that are still on this site's disk.

    python -m dcswitch_airflow.logs

Airflow uploads a log when its attempt ends and then empties or removes the local file, so a
local file with content is one that is missing, wholly or in part, at the remote store. Run it
only while no task runs here. The upload is Airflow's own, so the object has the key under which
its API server looks. Repeat: safe. Prints one line of JSON; exit 1 when some could not be uploaded.
"""

import json
import pathlib
import re
import sys

# as `[logging] log_filename_template` makes them, by default, below the base folder
ATTEMPT = re.compile(r"^dag_id=[^/]+/run_id=[^/]+/task_id=[^/]+/(map_index=\d+/)?attempt=\d+\.log(\.trigger\.\d+\.log)?$")


def base() -> pathlib.Path:
    """The folder of all logs."""
    from airflow.configuration import conf

    return pathlib.Path(conf.get("logging", "base_log_folder")).expanduser()


def waiting(folder: pathlib.Path) -> list[str]:
    """Paths, below the base folder, of attempts whose log has content on disk."""
    found = (path for path in folder.glob("dag_id=*/**/attempt=*.log*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in found if path.stat().st_size > 0)
    return sorted(name for name in names if ATTEMPT.match(name))


def main() -> int:
    """Uploads what waits and says how many."""
    out = sys.stdout
    sys.stdout = sys.stderr
    from airflow.configuration import conf
    from airflow.logging_config import get_remote_task_log

    before = waiting(base())
    remote = get_remote_task_log() if conf.getboolean("logging", "remote_logging") else None
    if before and remote is not None:
        for name in before:
            remote.upload(name, None)
    after = waiting(base())
    answer = {"found": len(before), "uploaded": len(before) - len(after), "left": after[:20], "left_count": len(after)}
    print(json.dumps(answer), file=out)
    return 1 if after else 0


if __name__ == "__main__":
    sys.exit(main())
