"""The work itself: verbs are files, choices are folders. Nothing here knows Prefect, MLflow or S3."""
