"""What a retraining makes, as Airflow Assets: their events tell which version, and of which run.

RAW_DATA, SHARDS, MODEL and METRICS: `extra` holds hash, size (bytes), revision, run, cached, and AP where it is known
(MODEL: training's, on val; METRICS: evaluate's, on the gate's split).
CANDIDATE: the fields of pipeline.publish.Published, and run, remote, decision, AP, split, table, report.
PRODUCTION: the fields of pipeline.promotion.Promoted, and AP, split.
"""

from airflow.sdk import Asset

RAW_DATA = Asset(name="raw_data", uri="dvc://data/raw", group="efficientdet")
SHARDS = Asset(name="shards", uri="dvc://data/shards", group="efficientdet")
MODEL = Asset(name="model", uri="dvc://data/model", group="efficientdet")
METRICS = Asset(name="metrics", uri="dvc://metrics.json", group="efficientdet")
CANDIDATE = Asset(name="candidate", uri="git://retrain", group="efficientdet")
PRODUCTION = Asset(name="production", uri="git://prod", group="efficientdet")

# What a stage of dvc.yaml hands on, by the path of its output.
OF_OUTPUT = {"data/raw": RAW_DATA, "data/shards": SHARDS, "data/model": MODEL, "metrics.json": METRICS}
