"""A browser without a window, for tests that look at pages."""

from __future__ import annotations

import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: what the page's script draws was not looked at")


def chromium(page: Path, profile: Path, *options: str) -> str:
    """Open a page; return what Chromium prints. The page's script must not complain, unless it is not allowed to run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=8000", "--enable-logging=stderr", *options, page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in run.stderr.splitlines() if "CONSOLE" in line and "Blocked script execution" not in line] == []
    return run.stdout


def told_on_phone(page: Path, profile: Path, script: str) -> str:
    """What a script says (it sets `said`) that finds a page as `inside`, drawn in a window as wide as a phone.

    A window of a browser cannot be as narrow as a phone, so the page stands in a frame; scripts may look into it because of a switch.
    """
    frame = page.with_name("phone.html")
    frame.write_text(
        f'<iframe src="{page.name}" width="390" height="3000"></iframe><script>onload = () => setTimeout(() => {{'
        f'const inside = document.querySelector("iframe").contentDocument; let said; {script}; document.title = said;'
        "}, 3000)</script>"
    )
    drawn = chromium(frame, profile, "--allow-file-access-from-files", "--dump-dom")
    frame.unlink()
    return unescape(drawn.partition("<title>")[2].partition("</title>")[0])


def measured_on_phone(page: Path, profile: Path) -> tuple[int, int]:
    """Width of a page's content in a window as wide as a phone, and how many of its plots are drawn there."""
    script = 'said = inside.documentElement.scrollWidth + " " + inside.querySelectorAll(".js-plotly-plot").length'
    width, plots = told_on_phone(page, profile, script).split()
    return int(width), int(plots)


def seen_without_scripts(page: Path, profile: Path) -> np.ndarray:
    """What a reader without scripts sees, as red, green and blue between 0 and 1."""
    from matplotlib.image import imread

    frame, shot = page.with_name("still.html"), page.with_name("still.png")
    frame.write_text(f'<body style="margin: 0"><iframe sandbox src="{page.name}" style="width: 800px; height: 6000px; border: 0"></iframe>')
    for _ in range(4):  # on a busy machine the picture may be taken before the frame is painted
        chromium(frame, profile, "--window-size=800,6000", f"--screenshot={shot}")
        image = imread(shot)[:, :, :3]
        if (image < 1).any():
            break
    return image
