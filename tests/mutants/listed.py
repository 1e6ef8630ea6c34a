"""All mistakes that `mutate.py` makes."""

from mutants import of_checkpoints, of_datasets, of_inputs_and_outputs, of_towers

MUTANTS = [*of_towers.MUTANTS, *of_checkpoints.MUTANTS, *of_inputs_and_outputs.MUTANTS, *of_datasets.MUTANTS]
