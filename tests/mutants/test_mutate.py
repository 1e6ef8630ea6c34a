"""The list of mutants fits the code, and a few of them are noticed; `make mutants` tries all."""

import pytest
from mutants.listed import MUTANTS
from mutants.mutate import ROOT, function_lines, mutated, run


def test_every_mutant_changes_the_code_and_is_python():
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text()
        assert mutated(source, mutant) != source
        assert all((ROOT / test).is_file() for test in mutant.tests)
    assert len(MUTANTS) >= 40


def test_an_expression_that_is_gone_is_told():
    mutant = MUTANTS[0]._replace(before="no such expression")
    with pytest.raises(ValueError, match="expected the expression once, got 0"):
        mutated((ROOT / mutant.file).read_text(), mutant)
    with pytest.raises(ValueError, match="f: expected one definition, got 2"):
        function_lines("def f(): pass\ndef f(): pass\n", "f")


def test_a_mistake_is_noticed_and_equivalent_code_survives():
    mistake = next(mutant for mutant in MUTANTS if "more_bytes > max_bytes" in mutant.before)
    equivalent = mistake._replace(after="not num_bytes + more_bytes <= max_bytes")
    assert run([mistake, equivalent], 1) == [equivalent]
