"""Run by Airflow's Python: loads the DAGs and prints what they are, and what the trigger form refuses, as JSON.

`python look.py DAGS DVC_YAML CONFS`: the stages are also read from another dvc.yaml; CONFS is JSON, a list.
"""

import copy
import json
import sys
from pathlib import Path

from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import ParamValidationError
from airflow.serialization.serialized_objects import DagSerialization

from dags.stages import read_stages

folder, dvc_file, confs = sys.argv[1:]
bag = DagBag(folder)


def refused(conf):
    """Airflow's words; none where it is taken."""
    params = copy.deepcopy(bag.dags["efficientdet_retrain"].params)
    try:
        params.update(conf)
        params.validate()
    except ParamValidationError as error:
        return str(error)
    return ""


found = {
    dag.dag_id: {
        "docs": dag.doc_md,
        "callbacks": bool(dag.default_args.get("on_failure_callback")) and bool(dag.deadline),
        "params": {name: dag.params.get_param(name).serialize() for name in dag.params},
        "serialized": {
            task["__var"]["task_id"]: task["__var"] for task in DagSerialization.to_dict(dag)["dag"]["tasks"]
        },
        "tasks": {
            task.task_id: {
                "downstream": sorted(task.downstream_task_ids),
                "docs": task.doc_md,
                "inlets": [asset.name for asset in task.inlets],
                "outlets": [asset.name for asset in task.outlets],
            }
            for task in dag.tasks
        },
    }
    for dag in bag.dags.values()
}
stages = {stage.name: {**stage.settings} for stage in read_stages(Path(dvc_file))}
refusals = [refused(conf) for conf in json.loads(confs)]
told = {"errors": bag.import_errors, "dags": found, "stages": stages, "refused": refusals}
print(json.dumps(told, default=str))
