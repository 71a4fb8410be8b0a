"""How a run does: evidence, judgement, suggestion. Torch alone."""

from downslope.verdict.collector import EvidenceCollector
from downslope.verdict.evidence import Evidence
from downslope.verdict.judgement import Verdict, judge, num_steps_left
from downslope.verdict.suggestion import Suggestion, suggest
from downslope.verdict.thresholds import WORDS, Thresholds, Word

__all__ = [
    "WORDS",
    "Evidence",
    "EvidenceCollector",
    "Suggestion",
    "Thresholds",
    "Verdict",
    "Word",
    "judge",
    "num_steps_left",
    "suggest",
]
