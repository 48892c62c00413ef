"""Everything between client, router and replicas is encrypted where a certificate is given."""

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest

pytest.importorskip("uvicorn")
from fleets import World
from worlds import make_index, make_queries

from gsl_dist.client import Client
from gsl_dist.errors import ConfigError
from gsl_dist.service.tls import Tls

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


def make_tls(folder):
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=gsl -keyout {key} -out {cert}"
    names = ["-addext", "subjectAltName=DNS:gsl,IP:127.0.0.1"]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return Tls(cert=str(cert), key=str(key))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encrypted")
    make_index(folder / "index")
    world = World(folder / "index", tls=make_tls(folder))
    world.certificate = folder / "cert.pem"
    yield world
    world.stop()


def test_an_encrypted_service_gives_the_same_answers(world):
    with Client(world.url, verify=ssl.create_default_context(cafile=str(world.certificate))) as client:
        hits = client.search(make_queries(), 5, 8, require_all=True)
    assert np.array_equal(hits.ids, world.local.search(make_queries(), 5, probes=8).ids)


def test_who_does_not_trust_the_certificate_is_told_nothing(world):
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{world.url}/livez")
    with pytest.raises(httpx.HTTPError):
        httpx.get(world.url.replace("https", "http") + "/livez")


def test_a_replica_speaks_to_nobody_in_plain_words(world):
    host, port = world.addresses["replica-0"].split(":")
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{host}:{port}/")


def test_a_replica_with_another_certificate_is_not_believed(world, tmp_path):
    other = make_tls(tmp_path)
    world.kill("replica-0")
    world.tls, kept = other, world.tls
    world.begin("replica-0")
    world.tls = kept
    with Client(world.url, verify=ssl.create_default_context(cafile=str(world.certificate))) as client:
        assert client.search(make_queries(), 5, 8).is_partial
    world.kill("replica-0")
    world.begin("replica-0")
    world.await_shards(3)


def test_files_that_are_no_certificate_are_named(tmp_path):
    (tmp_path / "cert.pem").write_text("nothing")
    for cert in (tmp_path / "cert.pem", Path("none.pem")):
        with pytest.raises(ConfigError, match=cert.name):
            Tls(cert=str(cert), key=str(cert)).listen()
