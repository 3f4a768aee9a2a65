"""The part of dc-switch that lives inside Apache Airflow.

boot    starts Airflow's processes from one warm interpreter, behind a gate
bundle  shows the DAG releases of the group as one versioned bundle
facts   says what this installation is: versions, schema head, fingerprints of keys
logs    uploads task logs that were left on disk
site    the name under which this site's processes sign their rows

Nothing here decides when Airflow may run: the agent of the site does.
"""
