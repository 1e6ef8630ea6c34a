"""The progress bar of a stream: on request alone, and from the first image on."""

from support.image_streams import SMALL_IMAGES, noise


def test_a_progress_bar_on_request(demo, capsys):
    images = [noise(32, 64, seed) for seed in range(7)]
    demo.encode(images, **SMALL_IMAGES)
    list(demo.iter_encode(iter(images), **SMALL_IMAGES))
    silent = capsys.readouterr()
    assert (silent.out, silent.err) == ("", "")
    demo.encode(images, progress=True, **SMALL_IMAGES)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "7/7" in shown.err
    assert "image/s" in shown.err
    list(demo.iter_encode(iter(images), progress=True, **SMALL_IMAGES))
    shown = capsys.readouterr().err
    assert "7image" in shown.replace(" ", "")
    assert "/7" not in shown  # nobody knows how many a generator has


def test_a_progress_bar_waits_for_the_first_image(demo, capsys):
    stream = demo.iter_encode([noise(32, 64)] * 2, progress=True, **SMALL_IMAGES)
    assert capsys.readouterr().err == ""
    list(stream)
    assert "2/2" in capsys.readouterr().err
