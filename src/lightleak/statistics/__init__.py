"""Statistics: pure functions from scores to estimates, tests and claims; no torch."""

from lightleak.statistics.conformal import (
    Discoveries,
    benjamini_hochberg,
    conformal_p_values,
    conformal_p_values_within_folds,
    smallest_resolvable,
)
from lightleak.statistics.dataset_inference import (
    FEWEST_GROUPS,
    DatasetInference,
    dataset_inference,
)
from lightleak.statistics.dynamics import (
    BatchDynamics,
    Estimates,
    batch_dynamics,
    mean_over_batches,
)
from lightleak.statistics.epsilon import (
    epsilon_lower_bound,
    epsilon_of_gaussian,
    gaussian_mu_lower_bound,
)
from lightleak.statistics.intervals import Estimate, clopper_pearson, korn_graubard
from lightleak.statistics.multiplicity import holm
from lightleak.statistics.permutation import combine_splits, mann_whitney, permutation_test, welch
from lightleak.statistics.power import minimum_detectable_auc, minimum_set_size
from lightleak.statistics.prevalence import prevalence, prevalence_lower_bound
from lightleak.statistics.probing import (
    Probed,
    ProbedCell,
    ProbingTest,
    draw_flips,
    probe,
    probing_test,
    published_probe,
)
from lightleak.statistics.residual import SMALLEST_P, ResidualTest, residual_test
from lightleak.statistics.roc import (
    RocCurve,
    RocPoint,
    Unresolvable,
    auc,
    auc_across_folds,
    auc_bootstrap,
    auc_delong,
    fpr_upper_bound,
    roc_curve,
    tpr_at_fpr,
    tpr_at_fpr_across_folds,
)
from lightleak.statistics.set_size import SetSizeCurve, set_size_curve

__all__ = [
    "FEWEST_GROUPS",
    "SMALLEST_P",
    "BatchDynamics",
    "DatasetInference",
    "Discoveries",
    "Estimate",
    "Estimates",
    "Probed",
    "ProbedCell",
    "ProbingTest",
    "ResidualTest",
    "RocCurve",
    "RocPoint",
    "SetSizeCurve",
    "Unresolvable",
    "auc",
    "auc_across_folds",
    "auc_bootstrap",
    "auc_delong",
    "batch_dynamics",
    "benjamini_hochberg",
    "clopper_pearson",
    "combine_splits",
    "conformal_p_values",
    "conformal_p_values_within_folds",
    "dataset_inference",
    "draw_flips",
    "epsilon_lower_bound",
    "epsilon_of_gaussian",
    "fpr_upper_bound",
    "gaussian_mu_lower_bound",
    "holm",
    "korn_graubard",
    "mann_whitney",
    "mean_over_batches",
    "minimum_detectable_auc",
    "minimum_set_size",
    "permutation_test",
    "prevalence",
    "prevalence_lower_bound",
    "probe",
    "probing_test",
    "published_probe",
    "residual_test",
    "roc_curve",
    "set_size_curve",
    "smallest_resolvable",
    "tpr_at_fpr",
    "tpr_at_fpr_across_folds",
    "welch",
]
