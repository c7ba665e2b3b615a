"""A headless Chromium for tests of HTML pages. The fixture `browser` skips the test if Chromium is not installed.

python tests/browser.py runs/leaves/report.html docs/report.png    # the screenshot in the README
"""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ARGUMENTS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "hide-scrollbars",
)  # fmt: skip


class Browser:
    """One page of Chromium. `list_requests` and `read_console` cover the time since the last call and since `open`."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.list_requests(), self.read_console()  # discard those of the previous page
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(url)

    def list_requests(self) -> list[str]:
        """The URLs that the page has requested, without data: URIs."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        # Without Chromium's internal pages, such as the one shown at startup.
        return [url for one in sent if not (url := one["request"]["url"]).startswith(("data:", "chrome:"))]

    def read_console(self) -> list[str]:
        """The messages in the console: script errors, blocked requests, violations of the content security policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def run_script(self, script: str, *arguments):
        """Run a script and return its result."""
        return self.driver.execute_script(script, *arguments)

    def press(self, key: str, *, holding: str | None = None) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        actions = ActionChains(self.driver)
        if holding is not None:
            actions.key_down(holding)
        actions.send_keys(key)
        if holding is not None:
            actions.key_up(holding)
        actions.perform()


@contextlib.contextmanager
def start_chromium(profile: Path) -> Iterator[Browser]:
    """Start Chromium with its profile in the empty folder `profile`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in (*ARGUMENTS, f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("Chromium and its driver are not installed")
    with start_chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def save_screenshot(page: Path, out: Path, *, height: int = 1530) -> None:
    """Save the top of a page as a PNG, 1280 pixels wide."""
    with tempfile.TemporaryDirectory() as profile, start_chromium(Path(profile)) as opened:
        opened.open(to_file_url(page), height=height)
        opened.driver.save_screenshot(str(out))


def to_file_url(path: Path) -> str:
    return path.resolve().as_uri()


if __name__ == "__main__":
    save_screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
