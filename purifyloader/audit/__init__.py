"""Look at a dataset through an energy model, for people who want to look at their data before they trust it.

`dataset_energies` reads the energies, `audit_energy` compares them with those of clean images as JSON, `picture`
draws that, and `purifyloader audit energy` is all of it from the command line.
"""

from purifyloader.audit.compare import audit_energy
from purifyloader.audit.energies import DatasetEnergies, dataset_energies
from purifyloader.audit.pictures import picture
from purifyloader.audit.report import ranked_csv

__all__ = ["DatasetEnergies", "audit_energy", "dataset_energies", "picture", "ranked_csv"]
