"""The name under which this site's processes sign their rows in the metadata database.

Set ``[core] hostname_callable = dcswitch_airflow.site.host`` where the machines of two sites
may have one name, and ``DC_SITE_HOST`` in the environment of every Airflow process: the name
must tell sites apart, and other processes of the site must reach the host by it.
"""

import os


def host() -> str:
    """The site's own host; fails loudly when it is not set."""
    name = os.environ.get("DC_SITE_HOST", "").strip()
    if not name:
        raise RuntimeError("DC_SITE_HOST is not set in the environment of this Airflow process")
    return name
