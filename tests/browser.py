"""A headless Chromium for tests of pages. `browser` is the fixture; it skips where there is no Chromium."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ARGUMENTS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync",
)  # fmt: skip


class Browser:
    """One page of Chromium. After `open`, `requests` and `console` say what it did from then on."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, dark: bool = False) -> None:
        self.requests(), self.console()  # those of the page before
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(url)

    def requests(self) -> list[str]:
        """The addresses that the page has asked for, data: URIs aside."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent if not one["request"]["url"].startswith("data:")]

    def console(self) -> list[str]:
        """What the page has complained about: errors of its scripts, refused loads, violations of its policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def run(self, script: str, *arguments):
        """What a script returns."""
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


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*ARGUMENTS, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def file_url(path: Path) -> str:
    return path.resolve().as_uri()
