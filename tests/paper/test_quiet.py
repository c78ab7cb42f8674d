import logging
import warnings

import pytest

from lightning_manifold_mixup.paper.quiet import IN_MEMORY, quiet_lightning

LOGGER = logging.getLogger("lightning.pytorch")
# As `rank_zero_info` does, unless `pytorch_lightning` has been imported since and made its own logger that of both.
rank_zero_info = logging.getLogger("lightning.pytorch.utilities.rank_zero").info
TIP = "💡 Tip: try something else"


@pytest.fixture
def shown():
    """Messages that reach a handler of Lightning's logger."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    LOGGER.addHandler(handler)
    yield messages
    LOGGER.removeHandler(handler)


def test_advertisements_are_dropped_and_other_messages_are_not(shown):
    with quiet_lightning():
        rank_zero_info(TIP)
        rank_zero_info("Manifold Mixup: alpha 2.0")
    assert shown == ["Manifold Mixup: alpha 2.0"]


def test_messages_below_the_level_are_dropped(shown):
    with quiet_lightning(logging.WARNING):
        rank_zero_info("GPU available: False")
        LOGGER.warning("something is wrong")
        with quiet_lightning():  # a command within a command stays as quiet
            rank_zero_info("GPU available: False")
    assert shown == ["something is wrong"]


def test_all_is_as_before_also_after_an_error(shown):
    level, filters = LOGGER.level, list(warnings.filters)

    @quiet_lightning(logging.ERROR, *IN_MEMORY)
    def failing():
        rank_zero_info(TIP)
        raise KeyError("x")

    with pytest.raises(KeyError):
        failing()
    assert LOGGER.level == level
    assert list(warnings.filters) == filters
    rank_zero_info(TIP)
    assert shown == [TIP]


def test_only_the_warnings_that_are_named_are_ignored():
    message = "The 'train_dataloader' does not have many workers which may be a bottleneck."
    with quiet_lightning(logging.INFO, *IN_MEMORY):
        warnings.warn(message, stacklevel=1)
        with pytest.warns(UserWarning, match="something else"):
            warnings.warn("something else", stacklevel=1)
