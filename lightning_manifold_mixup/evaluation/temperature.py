"""Temperature scaling and the Brier score: functions of logits and class indices.

Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017) divides all logits by one number,
fitted on data held out from the training. It often removes most of the calibration error, so networks are compared
after it, too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["brier_score", "fit_temperature"]


def brier_score(logits: Tensor, target: Tensor) -> Tensor:
    """Give the squared distance of the class probabilities from the right answer, summed over the classes.

    Args:
        logits: (n, classes).
        target: (n,) class indices.

    Returns:
        (n,), from 0 (sure and right) to 2 (sure and wrong).

    Example:
        >>> brier_score(torch.tensor([[0.0, 0.0], [100.0, 0.0]]), torch.tensor([0, 1]))
        tensor([0.5000, 2.0000])
    """
    return (logits.softmax(1) - F.one_hot(target, logits.shape[1])).square().sum(1)


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """Find the temperature by which logits are to be divided for the lowest negative log likelihood.

    Args:
        logits: (n, classes), of samples that the network was not trained on.
        target: (n,) class indices.

    Returns:
        The temperature, between 0.01 and 100: above 1 where the network was too sure of itself.

    Raises:
        ValueError: if there is no sample.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0]] * 4)  # sure at 98 %, right in three of four cases
        >>> temperature = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
        >>> (logits[0] / temperature).softmax(0)
        tensor([0.7500, 0.2500])
    """
    if len(target) == 0:
        raise ValueError("fit_temperature: expected at least one held-out sample, got none.")
    # An evaluation loop runs in inference mode, whose tensors cannot be differentiated: work on ordinary copies.
    with torch.inference_mode(False), torch.enable_grad():
        logits, target = logits.detach().cpu().double().clone(), target.cpu().clone()
        log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [log_temperature], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )

        def temperature() -> Tensor:
            # Bounded: where all held-out samples are right, the likelihood grows down to temperature 0.
            return log_temperature.clamp(-4.605, 4.605).exp()

        def nll() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(logits / temperature(), target)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(nll)  # type: ignore[no-untyped-call]
        return temperature().item()
