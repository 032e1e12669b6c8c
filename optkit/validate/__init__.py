"""The validator: is the engine still right, is it faster, and how sure is that."""

from optkit.validate.contest import Contest, Entrant
from optkit.validate.gate import Verdict
from optkit.validate.validator import Report, compare_entrants, validate

__all__ = ["Contest", "Entrant", "Report", "Verdict", "compare_entrants", "validate"]
