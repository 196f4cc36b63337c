"""Which function an op is."""

import pytest

from slipstream.kernels.dispatch import op


class Number(int):
    is_cuda = False


class OnDevice(int):
    is_cuda = True


def block_size(smallest: int, n: int = 0) -> int:
    """Stands for a definition; its twin, of the same name, is in the module ``launch``."""
    return -1


def test_the_device_of_one_argument_chooses():
    first, second = op(block_size, "launch"), op(block_size, "launch", by=1)
    assert first(Number(5)) == -1 and first(OnDevice(5)) == 8
    assert second(OnDevice(5), Number(1)) == -1 and second(Number(5), OnDevice(1)) == 8
    assert first.__doc__ == block_size.__doc__


def test_a_twin_must_have_the_name():
    def unheard_of(x: Number) -> None: ...

    with pytest.raises(AttributeError, match="unheard_of"):
        op(unheard_of, "launch")(OnDevice(1))
