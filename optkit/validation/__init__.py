"""The validator: is the engine still right, is it faster, and how sure is that."""

from optkit.validation.contest import Contest, Entrant
from optkit.validation.gate import Verdict
from optkit.validation.validator import Report, compare_entrants, validate

__all__ = ["Contest", "Entrant", "Report", "Verdict", "compare_entrants", "validate"]
