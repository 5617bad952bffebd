"""Train data/tiny_encoder.pt, the small encoder that makes the default runs need no download.

    python -m data.train_tiny_encoder            # about ten minutes on two CPU cores

Like an ImageNet encoder it learns to name the object of a picture that shows one object or none:
crops of built-in scenes, around their objects with a random margin and from between them, sorted
into eight classes and "nothing". The scenes have another seed than those that the methods train and
test on, and no mask is used.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from common import flags, runtime
from common.backbones import TINY_WEIGHTS, backbone
from common.bank import Bank, batches, epoch_order
from data.shapes import CLASSES, Shapes

BATCH = 64
SIDE = 64  # of a crop
RATE = 4e-3  # highest learning rate
GAP = 40  # side of an empty place, in pixels of the scene


def collect(scenes: Shapes, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Objects and empty places: scene [N], box (left, top, right, bottom) [N, 4], class [N]."""
    scene = []
    box = []
    kind = []
    for i in range(len(scenes)):
        objects = scenes.objects(i)
        for one in objects:
            scene.append(i)
            box.append(one["box"])
            kind.append(CLASSES.index(one["class"]))

        # A random square that no object's box overlaps shows nothing.
        x, y = (torch.rand(2, generator=random) * (scenes.size - GAP)).int().tolist()
        empty = (x, y, x + GAP, y + GAP)
        if not any(overlap(empty, one["box"]) for one in objects):
            scene.append(i)
            box.append(empty)
            kind.append(len(CLASSES))
    return torch.tensor(scene), torch.tensor(box).float(), torch.tensor(kind)


def overlap(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    """Whether two boxes (left, top, right, bottom) share pixels."""
    across = one[0] < two[2] and two[0] < one[2]
    down = one[1] < two[3] and two[1] < one[3]
    return across and down


def crop(images: Tensor, boxes: Tensor, random: torch.Generator) -> Tensor:
    """A square around each box, 1.1 to 2.7 times its side, shifted a little. [B, 3, 64, 64]"""
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2  # [B, 2]
    side = (boxes[:, 2:] - boxes[:, :2]).amax(1, True)  # [B, 1]
    side = side * (1.1 + 1.6 * torch.rand(side.shape, generator=random))
    middle = middle + side * 0.25 * (torch.rand(middle.shape, generator=random) - 0.5)
    squares = torch.cat([middle - side / 2, middle + side / 2], 1)  # [B, 4]
    return roi_align(images, list(squares[:, None]), SIDE, sampling_ratio=2, aligned=True)


def main(argv: list[str] | None = None) -> None:
    """Train, report accuracy on unseen scenes, save the encoder in half precision."""
    parser = argparse.ArgumentParser(
        prog="python -m data.train_tiny_encoder", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--scenes", type=flags.positive, default=2500, help="to train on [2500]")
    parser.add_argument("--epochs", type=flags.positive, default=25, help="[25]")
    parser.add_argument(
        "--seed", type=flags.seed, default=1, help="of the scenes; the methods use seed 0 [1]"
    )
    parser.add_argument("--out", default=TINY_WEIGHTS, help="the file [data/tiny_encoder.pt]")
    args = parser.parse_args(argv)

    # Draw the scenes, and collect what is to be named in them.
    torch.manual_seed(args.seed)
    random = runtime.generator("cpu", args.seed, "crops")
    train = Shapes("train", count=args.scenes, seed=args.seed)
    test = Shapes("test", count=200, seed=args.seed)
    scene, box, kind = collect(train, random)
    test_scene, test_box, test_kind = collect(test, random)
    bank = Bank(train, train.size, torch.device("cpu"))
    test_bank = Bank(test, test.size, torch.device("cpu"))

    # The encoder, a classifier on its coarsest features, and one cycle of the learning rate.
    encoder = backbone("tiny", "none")
    head = nn.Linear(encoder.channels[-1], len(CLASSES) + 1)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, RATE, epochs=args.epochs, steps_per_epoch=len(kind) // BATCH, pct_start=0.15
    )

    for epoch in range(1, args.epochs + 1):
        encoder.train()
        order, batch = epoch_order(len(kind), BATCH, args.seed, epoch)
        for index, flip in batches(order, batch, args.seed, epoch):
            crops = crop(bank.images(scene[index]), box[index], random)  # [B, 3, 64, 64]
            crops = torch.where(flip.view(-1, 1, 1, 1), crops.flip(3), crops)
            logits = head(encoder(crops)[-1].mean((2, 3)))  # [B, 9]
            loss = F.cross_entropy(logits, kind[index], label_smoothing=0.05)

            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()

        # How many crops of unseen scenes are named rightly?
        encoder.eval()
        with torch.no_grad():
            crops = crop(test_bank.images(test_scene), test_box, random)
            found = head(encoder(crops)[-1].mean((2, 3))).argmax(1)
        right = (found == test_kind).float().mean()
        runtime.say(f"epoch {epoch}: loss {loss:.3f}, {right:.1%} of unseen crops right")

    # Save the weights with 16 bits; counters stay whole numbers.
    state = {}
    for key, value in encoder.state_dict().items():
        state[key] = value.half() if value.is_floating_point() else value
    runtime.save_checkpoint(args.out, **state)


if __name__ == "__main__":
    runtime.cli(main)
