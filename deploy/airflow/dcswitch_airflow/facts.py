"""Says, as one line of JSON, what this Airflow installation is, as Airflow itself reads its settings.

    python -m dcswitch_airflow.facts NONCE

Keys are never printed: only HMAC-SHA256(key, NONCE + name), so that two sites can be compared
under a nonce that both are given. Reads no database and changes nothing.
"""

import functools
import hashlib
import hmac
import json
import platform
import sys

KEYS = {
    "fernet_key": ("core", "fernet_key"),
    "jwt_secret": ("api_auth", "jwt_secret"),
    "api_secret_key": ("api", "secret_key"),
}
NUMBERS = {
    "heartbeat_interval_s": ("workers", "min_heartbeat_interval"),
    "heartbeats_failed_max": ("workers", "max_failed_heartbeats"),
    "api_retries": ("workers", "execution_api_retries"),
    "api_timeout_s": ("workers", "execution_api_timeout"),
    "api_retry_wait_max_s": ("workers", "execution_api_retry_wait_max"),
    "orphan_interval_s": ("scheduler", "orphaned_tasks_check_interval"),
    "scheduler_threshold_s": ("scheduler", "scheduler_health_check_threshold"),
    "scheduler_heartbeat_s": ("scheduler", "scheduler_heartbeat_sec"),
}


def fingerprint(key: str, name: str, nonce: str) -> str:
    """What may be shown of a key."""
    return hmac.new(key.encode(), f"{nonce}\n{name}".encode(), hashlib.sha256).hexdigest()


@functools.cache
def heads() -> tuple[str, ...]:
    """The schema revisions that these binaries want."""
    from airflow.utils.db import _get_alembic_config
    from alembic.script import ScriptDirectory

    return tuple(sorted(ScriptDirectory.from_config(_get_alembic_config()).get_heads()))


def collect(nonce: str) -> dict:
    """All facts of this installation."""
    from airflow import __version__
    from airflow.configuration import conf

    found = {name: conf.get(*where, fallback=None) for name, where in KEYS.items()}
    numbers = {name: conf.getfloat(*where, fallback=None) for name, where in NUMBERS.items()}
    return {
        "version": __version__,
        "python": platform.python_version(),
        "heads": heads(),
        "executor": conf.get("core", "executor", fallback=""),
        "fingerprints": {name: fingerprint(key, name, nonce) for name, key in found.items() if key},
        "missing": sorted(name for name, key in found.items() if not key),
        "short": sorted(name for name, key in found.items() if key and len(key) < 16),
        "numbers": {name: value for name, value in numbers.items() if value is not None},
        "remote_logging": conf.getboolean("logging", "remote_logging", fallback=False),
        "remote_log_base": conf.get("logging", "remote_base_log_folder", fallback=""),
    }


def main() -> int:
    """Prints the facts."""
    if len(sys.argv) != 2 or not sys.argv[1]:
        print("usage: python -m dcswitch_airflow.facts NONCE", file=sys.stderr)
        return 2
    out = sys.stdout
    sys.stdout = sys.stderr  # Airflow may print while it loads; the answer is one line alone
    print(json.dumps(collect(sys.argv[1])), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
