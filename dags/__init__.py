"""The retraining in Airflow: DAGs, and what their tasks call. It runs without the ML environment."""
