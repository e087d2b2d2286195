"""The web page of a running server, in a real Chromium.

usage: page.py URL CHROMIUM [SCREENSHOT]    (of `serve`, for a chat model made of examples/numerals; see run.sh)

A person's way through the page, by roles and labels as a screen reader knows them; the first thing that is not as it should be ends the program with
a traceback.
"""
import sys

from playwright.sync_api import expect, sync_playwright

URL, CHROMIUM = sys.argv[1].rstrip("/"), sys.argv[2]
RIGHT = "mille neuf cent quatre-vingt-sept"
troubles, elsewhere = [], []


def open_page(browser, **how):
    context = browser.new_context(**how)
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: request.url.startswith(URL) or elsewhere.append(request.url))
    page.goto(URL + "/")
    return page


def settle(page, **settings):
    """Types settings into their dialog."""
    page.get_by_role("button", name="Settings").click()
    for label, value in settings.items():
        page.get_by_label(label.replace("_", " ")).fill(value)
    page.keyboard.press("Escape")


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page = open_page(browser, color_scheme="light")
    expect(page).to_have_title("numerals-chat")
    answers = page.get_by_role("article", name="Model", exact=True)
    box = page.get_by_placeholder("Message")
    expect(box).to_be_focused()
    settle(page, Temperature="0")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    box.focus()

    # By keyboard alone: Enter sends, the answer comes, and the box has the focus again.
    page.keyboard.type("fr 1987 =")
    page.keyboard.press("Enter")
    expect(answers.last).to_contain_text(RIGHT)
    expect(answers.last).to_contain_text("written")
    expect(page.get_by_role("status")).to_have_text("Answer: " + RIGHT)
    expect(box).to_be_focused()
    expect(box).to_have_value("")
    # A second turn, and the same again.
    page.keyboard.type("it 42 =")
    page.get_by_role("button", name="Send").click()
    expect(answers.last).to_contain_text("quarantadue")
    page.get_by_role("button", name="Again").click()
    expect(answers.last).to_contain_text("quarantadue")
    expect(answers).to_have_count(2)

    # What the server refuses is told, and the conversation goes on.
    page.keyboard.type("1" * 500)
    page.keyboard.press("Enter")
    expect(answers.last).to_contain_text("context holds 128 tokens")
    page.keyboard.type("de 21 =")
    page.keyboard.press("Enter")
    expect(answers.last).to_contain_text("einundzwanzig")
    if len(sys.argv) > 3:
        page.screenshot(path=sys.argv[3])

    # Escape stops an answer that does not come.
    page.route("**/v1/chat/completions", lambda route: None)
    page.keyboard.type("fr 7 =")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(answers.last).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.unroute("**/v1/chat/completions")

    # A new conversation; settings and theme outlive the page.
    page.get_by_role("button", name="New", exact=True).click()
    expect(answers).to_have_count(0)
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Switch between light and dark").click()
    dark = page.evaluate(background)
    assert light != dark, light
    page.reload()
    assert page.evaluate(background) == dark
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_have_value("0")

    # On a phone that is dark nothing sticks out.
    phone = open_page(browser, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True, color_scheme="dark")
    assert phone.evaluate(background) == dark
    phone.get_by_placeholder("Message").fill("fr 1987 =")
    phone.get_by_role("button", name="Send").tap()
    expect(phone.get_by_role("article", name="Model", exact=True)).to_have_count(1)
    expect(phone.get_by_role("article", name="Model", exact=True)).to_contain_text("written")
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the phone"
    browser.close()

assert not troubles, troubles
assert not elsewhere, f"the page asked other servers: {elsewhere}"
print("ok: the page in Chromium")
