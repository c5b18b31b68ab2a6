"""When things happen: the Prefect flows and the command. The only package that imports prefect."""
