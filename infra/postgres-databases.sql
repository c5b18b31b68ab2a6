-- Postgres makes the database `prefect` by itself (POSTGRES_DB); MLflow has one of its own.
CREATE DATABASE mlflow;
