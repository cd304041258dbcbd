"""The mean of discriminators: the obvious rule, for comparison."""

from __future__ import annotations

from torch import Tensor

from fedgan_lightning.federation.feedback.ensemble import EnsembleFeedback, mean_logit


class MeanDiscriminator(EnsembleFeedback):
    """D(x) = sum_i pi_i D_i(x): the generator learns from the mean belief of all clients.

    Under label skew classes that few clients have vanish: from three clients with a common and a private class each the
    common class is all that is left. It is in this package to be compared with; source: the baseline of Zhang, Qu,
    Chang, Liu, Metaxas, Chen 2021, section 4 ("avg").
    """

    def combined(self, logits: Tensor, log_weights: Tensor) -> Tensor:
        return mean_logit(logits, log_weights)
