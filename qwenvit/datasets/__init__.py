"""Many files in, shards out: a job that any death interrupts and the same command continues."""
