"""Run by Airflow's Python: the retraining by dag.test(); prints its state, and which stages came from the cache."""

import json
import os
import sys

from airflow.dag_processing.dagbag import DagBag

bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"])
dag = bag.dags["efficientdet_retrain"]
dag.deadline = None  # dag.test() of Airflow 3.3.2 takes it for the id of one, and breaks off at the end
run = dag.test(run_conf=json.loads(sys.argv[1]))
answers = {ti.task_id: ti.xcom_pull(task_ids=ti.task_id) or {} for ti in run.get_task_instances()}
cached = {task: answer["cached"] for task, answer in answers.items() if "cached" in answer}
print(json.dumps({"state": run.state, "cached": cached}))
