"""Videos and sheets have the frames and sizes that were asked for."""

import av
import pytest
import torch
from PIL import Image

from distill3d.export.video import contact_sheet, save_image, save_video, turntable_frames
from distill3d.scenes.voxels import VoxelField, VoxelOptions


def test_a_turntable_becomes_an_mp4(tmp_path):
    field = VoxelField(VoxelOptions(resolution=8)).eval()
    frames = list(turntable_frames(field, frames=5, size=33))
    assert len(frames) == 5 and frames[0].shape == (3, 33, 33)
    path = tmp_path / "turn.mp4"
    save_video(path, frames, fps=10)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, float(stream.average_rate)) == (34, 34, 10)
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    assert len(decoded) == 5
    seen = torch.tensor(decoded[0])[:33, :33].permute(2, 0, 1) / 255
    assert (seen - frames[0]).abs().mean() < 0.03
    assert [p.name for p in tmp_path.iterdir()] == ["turn.mp4"]


def test_frames_made_side_by_side_are_those_made_one_by_one():
    field = VoxelField(VoxelOptions(resolution=8)).eval()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = list(turntable_frames(field, frames=7, size=17))
        torch.set_num_threads(3)
        several = list(turntable_frames(field, frames=7, size=17))
        first = next(turntable_frames(field, frames=7, size=17))  # left early
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.stack(single), torch.stack(several)) and torch.equal(first, single[0])
    assert not torch.equal(single[0], single[3])


@pytest.mark.parametrize("frames", [[], [torch.zeros(3, 8, 8), torch.zeros(3, 8, 10)]])
def test_impossible_videos_are_value_errors_and_leave_nothing(tmp_path, frames):
    with pytest.raises(ValueError, match="frame"):
        save_video(tmp_path / "a.mp4", frames)
    assert not list(tmp_path.iterdir())


def test_a_sheet_keeps_order_and_colors(tmp_path):
    images = torch.stack([torch.full((3, 4, 6), i / 5) for i in range(5)])
    sheet = contact_sheet(images, 3, gap=2)
    assert sheet.size == (3 * 6 + 4, 2 * 4 + 2)
    corners = [(0, 0), (8, 0), (16, 0), (0, 6), (8, 6), (16, 6)]
    grays = [sheet.getpixel(at)[0] for at in corners]
    assert grays == [0, 51, 102, 153, 204, 255]  # the sixth place is empty: white
    save_image(tmp_path / "sheet.png", sheet)
    save_image(tmp_path / "one.png", images[1])
    with Image.open(tmp_path / "sheet.png") as back, Image.open(tmp_path / "one.png") as one:
        assert back.size == sheet.size and one.getpixel((0, 0)) == (51, 51, 51)
    with pytest.raises(ValueError, match="columns"):
        contact_sheet(images, 0)
