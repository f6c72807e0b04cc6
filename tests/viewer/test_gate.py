"""Without the token neither the page nor the websocket is served, and no other page may use the viewer."""

import asyncio
import socket
import threading

import pytest

from distill3d.viewer.gate import Address, Gate, address

TOKEN = "a-token-1234"
UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade"}


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def behind(loop):
    """A server that answers everything with what it was asked, then sends back what it gets."""

    async def echo(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + head)
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    async def start():
        return await asyncio.start_server(echo, "127.0.0.1", 0)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield server.sockets[0].getsockname()[1]
    loop.call_soon_threadsafe(server.close)


@pytest.fixture
def gate(loop, behind):
    gates = []

    def make(**where):
        gates.append(Gate(Address(port=0, **where), behind, loop))
        return gates[-1]

    yield make
    for one in gates:
        one.close()


def ask(gate, target="/", method="GET", host=None, more=b"", **headers):
    """The first line of the answer, and everything of it."""
    names = {"Host": host or f"127.0.0.1:{gate.port}", **{k.replace("_", "-"): v for k, v in headers.items()}}
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in names.items()) + "\r\n"
    with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as connection:
        connection.sendall(head.encode() + more)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(1000), b"")).decode()
    return answer.split("\r\n")[0].removeprefix("HTTP/1.1 "), answer


def test_without_a_token_this_machine_gets_everything(gate):
    open_gate = gate()
    status, answer = ask(open_gate, "/page?x=1", more=b"and more")
    assert status == "200 OK" and "GET /page?x=1" in answer and answer.endswith("and more")
    own = f"http://127.0.0.1:{open_gate.port}"
    assert ask(open_gate, **UPGRADE, Origin=own)[0] == "200 OK"
    assert ask(open_gate, host="localhost:9000")[0] == "200 OK"  # through ssh -L 9000:localhost:8080


@pytest.mark.parametrize("upgrade", [{}, UPGRADE], ids=["page", "websocket"])
@pytest.mark.parametrize(
    ("target", "cookie"),
    [
        ("/", None),
        ("/?token=", None),
        ("/?token=a-token-1235", None),
        ("/a-token-1234", None),
        ("/?other=a-token-1234", None),
        ("/", "{name}=a-token-1235"),
        ("/", "distill3d-1=a-token-1234"),
        ("/", "{name}"),
        ("/", 'x="a-token-1234'),
    ],
)
def test_without_the_token_nothing_is_served(upgrade, target, cookie, gate):
    guarded = gate(token=TOKEN)
    headers = {**upgrade, **({"Cookie": cookie.format(name=f"distill3d-{guarded.port}")} if cookie else {})}
    status, answer = ask(guarded, target, **headers)
    assert status == "403 Forbidden" and "GET" not in answer and TOKEN not in answer and "?token=TOKEN" in answer


def test_the_token_gives_a_cookie_that_opens_page_and_websocket(gate):
    guarded = gate(token=TOKEN)
    status, answer = ask(guarded, f"/?token={TOKEN}")
    assert status == "303 See Other" and "Location: /\r\n" in answer  # the address bar no longer has it
    cookie = answer.split("Set-Cookie: ")[1].split("\r\n")[0]
    assert cookie.endswith("; HttpOnly; SameSite=Strict; Path=/")
    for headers in ({}, UPGRADE):
        assert ask(guarded, Cookie=f"other=1; {cookie.split(';')[0]}", **headers)[0] == "200 OK"
    assert ask(guarded, f"/?token={TOKEN}", **UPGRADE)[0] == "200 OK"  # a client without cookies


@pytest.mark.parametrize("where", [{}, {"token": TOKEN}], ids=["open", "token"])
def test_pages_of_others_get_nothing(where, gate):
    """Any page in a browser may connect to 127.0.0.1; a name of its own may be made to lead there (DNS rebinding)."""
    one = gate(**where)
    target = f"/?token={TOKEN}"
    assert ask(one, target, Origin="http://evil.example", **UPGRADE)[0] == "403 Forbidden"
    assert ask(one, target, Origin="http://127.0.0.1:1", **UPGRADE)[0] == "403 Forbidden"
    assert ask(one, target, host="evil.example")[0] == "403 Forbidden"


def test_other_requests_are_refused(gate):
    one = gate()
    assert ask(one, method="POST")[0] == "403 Forbidden"
    with socket.create_connection(("127.0.0.1", one.port), timeout=10) as connection:
        connection.sendall(b"x" * (1 << 17))  # never an end of the head
        with pytest.raises(ConnectionError):
            while connection.recv(1000):
                connection.sendall(b"x")
            raise ConnectionError
    assert ask(one)[0] == "200 OK"


def test_a_port_in_use_is_an_error(gate, loop, behind):
    taken = gate().port
    with pytest.raises(ValueError, match=f"port {taken} is in use: choose another one, or 0"):
        Gate(Address(port=taken), behind, loop)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"host": "0.0.0.0"}, "can be reached by others: .* TOKEN@0.0.0.0:8080"),
        ({"host": "192.0.2.1"}, "can be reached by others"),
        ({"host": "::"}, "can be reached by others"),
        ({"host": "example.org"}, "can be reached by others"),
        ({"port": 70000}, "port must be 0 to 65535, got 70000"),
        ({"token": "short"}, "token must be at least 8"),
        ({"token": "with a space"}, "token must be at least 8"),
    ],
)
def test_addresses_that_are_not_allowed(where, reason):
    with pytest.raises(ValueError, match=reason):
        Address(**where)


def test_an_address_of_another_machine_is_an_error(gate):
    with pytest.raises(ValueError, match=r"192\.0\.2\.1 is not an address of this machine"):
        gate(host="192.0.2.1", token=TOKEN)
    assert Address("::1").local and Address("localhost").url(8080) == "http://localhost:8080/"
    assert Address("0.0.0.0", token=TOKEN).url(9) == f"http://0.0.0.0:9/?token={TOKEN}"


def test_addresses_as_they_are_typed():
    assert address("9000") == Address(port=9000) == address("127.0.0.1:9000")
    assert address("a-token-1234@0.0.0.0:80") == Address("0.0.0.0", 80, TOKEN)
    assert address("a-token-1234@80") == Address(port=80, token=TOKEN)
    assert address("[::1]:80").url(80) == "http://[::1]:80/"
    for wrong in (
        "",
        "localhost",
        "localhost:",
        "80:localhost",
        "-1",
        "http://localhost:80/",
        "@0.0.0.0:80",
        "0.0.0.0:80",
    ):
        with pytest.raises(ValueError, match=r"(PORT, HOST:PORT or TOKEN@HOST:PORT|at least 8|reached by others)"):
            address(wrong)
