"""Meta-World's tasks in words: their instructions, and how far their layouts may be spread. Knows no simulator."""

from collections.abc import Mapping

from mvwan.errors import MvwanError, nearest

INSTRUCTIONS: Mapping[str, str] = {
    "assembly-v3": "Put the ring over the peg.",
    "basketball-v3": "Put the basketball into the hoop.",
    "bin-picking-v3": "Move the block from one bin into the other.",
    "box-close-v3": "Put the lid on the box.",
    "button-press-topdown-v3": "Press the button from above.",
    "button-press-topdown-wall-v3": "Reach over the wall and press the button from above.",
    "button-press-v3": "Press the button.",
    "button-press-wall-v3": "Reach over the wall and press the button.",
    "coffee-button-v3": "Press the button of the coffee machine.",
    "coffee-pull-v3": "Pull the mug away from the coffee machine.",
    "coffee-push-v3": "Push the mug under the coffee machine.",
    "dial-turn-v3": "Turn the dial.",
    "disassemble-v3": "Lift the ring off the peg.",
    "door-close-v3": "Close the door.",
    "door-lock-v3": "Lock the door.",
    "door-open-v3": "Open the door.",
    "door-unlock-v3": "Unlock the door.",
    "drawer-close-v3": "Close the drawer.",
    "drawer-open-v3": "Open the drawer.",
    "faucet-close-v3": "Close the faucet.",
    "faucet-open-v3": "Open the faucet.",
    "hammer-v3": "Hammer the nail into the wall.",
    "hand-insert-v3": "Put the hand into the hole.",
    "handle-press-side-v3": "Press the handle down from the side.",
    "handle-press-v3": "Press the handle down.",
    "handle-pull-side-v3": "Pull the handle up from the side.",
    "handle-pull-v3": "Pull the handle up.",
    "lever-pull-v3": "Pull the lever up.",
    "peg-insert-side-v3": "Insert the peg into the hole from the side.",
    "peg-unplug-side-v3": "Pull the peg out of the hole.",
    "pick-out-of-hole-v3": "Lift the puck out of the hole.",
    "pick-place-v3": "Pick up the puck and bring it to the goal.",
    "pick-place-wall-v3": "Pick up the puck and bring it over the wall to the goal.",
    "plate-slide-back-side-v3": "Slide the plate out of the cabinet to the side.",
    "plate-slide-back-v3": "Slide the plate back out of the cabinet.",
    "plate-slide-side-v3": "Slide the plate into the cabinet from the side.",
    "plate-slide-v3": "Slide the plate into the cabinet.",
    "push-back-v3": "Pull the block back to the goal.",
    "push-v3": "Push the puck to the goal.",
    "push-wall-v3": "Push the puck around the wall to the goal.",
    "reach-v3": "Reach the goal.",
    "reach-wall-v3": "Reach over the wall to the goal.",
    "shelf-place-v3": "Put the block onto the shelf.",
    "soccer-v3": "Push the ball into the net.",
    "stick-pull-v3": "Pull the box with the stick.",
    "stick-push-v3": "Push the box with the stick.",
    "sweep-into-v3": "Sweep the block into the hole.",
    "sweep-v3": "Sweep the block off the table.",
    "window-close-v3": "Close the window.",
    "window-open-v3": "Open the window.",
}

WIDENED: Mapping[str, Mapping[int, tuple[float, float]]] = {
    "button-press-topdown-v3": {0: (-0.3, 0.3)},
    "coffee-button-v3": {0: (-0.2, 0.2)},
    "drawer-close-v3": {0: (-0.25, 0.25)},
    "drawer-open-v3": {0: (-0.25, 0.25)},
    "faucet-open-v3": {0: (-0.25, 0.25)},
    "plate-slide-v3": {0: (-0.2, 0.2), 3: (-0.15, 0.15)},
    "window-open-v3": {0: (-0.25, 0.15)},
}
"""Task -> axis of its layout -> limits in metres that replace the stock ones: so far apart that another layout's path does not help."""


def task_name(task: str) -> str:
    """Meta-World's name of a task, given with or without its version: `drawer-open-v3` for `drawer-open`, or `MvwanError`."""
    for name in (task, f"{task}-v3"):
        if name in INSTRUCTIONS:
            return name
    raise MvwanError(f"task {task!r}: Meta-World has no such task.{nearest(task, INSTRUCTIONS)} All: {', '.join(sorted(INSTRUCTIONS))}")
