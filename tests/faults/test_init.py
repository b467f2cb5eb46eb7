"""Faults of folders that `fastseg data init` and `fastseg data rasterise` look at: one line, and no file is written."""

import made_folders as made


def refused(call, *command) -> str:
    """The one line by which a command refuses."""
    code, out, err = call("data", *command)
    assert (code, out, err.count("\n")) == (1, "", 1)
    return err.removeprefix("fastseg: ")


def test_masks_saved_as_jpeg(call, row, tmp_path):
    for seed in range(3):
        made.save(tmp_path, f"own/images/{seed}.jpg", made.photo(seed))
        made.save(tmp_path, f"own/masks/{seed}.jpg", made.indices() * 100, quality=95)
    says = refused(call, "init", tmp_path / "own")
    assert not (tmp_path / "own" / "dataset.toml").exists()
    row("`data init`: masks saved as JPEG", says, "export the masks anew as PNG")


def test_masks_of_objects(call, row, tmp_path):
    for seed in range(3):
        made.save(tmp_path, f"own/images/{seed}.jpg", made.photo(seed))
        made.save(tmp_path, f"own/masks/{seed}.png", made.indices().astype("uint16") * 1000)
    says = refused(call, "init", tmp_path / "own")
    row("`data init`: masks whose values are objects, of 16 bits", says, "give each class one value")


def test_an_annotation_cut_short(call, row, tmp_path):
    made.labelme(tmp_path / "own")
    file = tmp_path / "own" / "photos" / "2.json"
    file.write_text(file.read_text()[:100])
    says = refused(call, "rasterise", tmp_path / "own", tmp_path / "own" / "masks")
    assert not (tmp_path / "own" / "masks").exists()
    row("`data rasterise`: a JSON file cut short", says, "export it anew")


def test_an_annotation_with_entities(call, row, tmp_path):
    made.cvat(tmp_path / "own")
    file = tmp_path / "own" / "annotations.xml"
    file.write_text('<!DOCTYPE a [<!ENTITY b "ha">]>\n' + file.read_text().partition("\n")[2])
    says = refused(call, "rasterise", tmp_path / "own", tmp_path / "own" / "masks")
    row("`data rasterise`: an XML file whose entities may grow to gigabytes", says, "remove the <!DOCTYPE>")
