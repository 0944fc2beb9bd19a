"""The cases that people report most, each reproduced small: the symptom as it was reported, settings side by side,
their curves, what the runs say about the cause, and the settings that help.

The main idea: a case states claims ("usage at the end is lower at D = 256 than at D = 32") and every claim is judged on
runs of several seeds. It holds only where Student's interval over seeds excludes 0; otherwise the case says that it was
not seen here. Start with `case`, then read one case of `lab_cases`.

case.py             what a case is: settings, measures, claims, and their judgement
lab_cases.py        three cases in the lab without images
perplexity_case.py  one codebook counted in batches of many sizes
checkpoint_case.py  training that goes on from weights without a discriminator
case_figure.py      curves of a case
casebook.py         all cases, and what the notebook may set
"""

from ibqlab.studies.cases.case import Arm, Case, CaseMeasure, CaseResult, Claim, Finding
from ibqlab.studies.cases.case_figure import plot_case
from ibqlab.studies.cases.casebook import CASES, CaseBook, CasesParameters, prepare_cases

__all__ = [
    "CASES",
    "Arm",
    "Case",
    "CaseBook",
    "CaseMeasure",
    "CaseResult",
    "CasesParameters",
    "Claim",
    "Finding",
    "plot_case",
    "prepare_cases",
]
