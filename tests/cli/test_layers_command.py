"""`manifold-mixup layers` on networks that are not ours: what it prints, and what it says to a slip."""

import pytest
import torchvision

from lightning_manifold_mixup.cli import main


def layers(capsys, network, *options):
    main(["layers", f"--model.class_path=torchvision.models.{network}", *options])
    return capsys.readouterr().out


def test_table_of_long_names_fits_and_keeps_them_whole(capsys):
    """And the network is made from a function that hands its keyword arguments on."""
    out = layers(capsys, "swin_t", "--model.init_args.num_classes=4", "--input_shape=3,32,32")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    names = {line.split("│")[1].strip() for line in lines if line.startswith("│")}
    assert names == {"input", *(name for name, _ in torchvision.models.swin_t(num_classes=4).named_modules() if name)}
    assert "(5, 4)" in out
    assert lines[-1] == "layers='auto' mixes at: input, features.1, features.3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input_shape=5,32,32"], "ResNet does not run on an input of shape (5, 5, 32, 32): Given groups=1,"),
        (["--input_shape=3,-3,32"], "sizes with commas between, such as 3,32,32, got '3,-3,32'"),
        (["--input_shape=3,,32"], "sizes with commas between, such as 3,32,32, got '3,,32'"),
        (["--model.init_args.num_clases=3"], "num_clases"),
    ],
)
def test_slips_are_one_message(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        layers(capsys, "resnet18", *options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
