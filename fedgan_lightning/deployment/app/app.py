"""What Flower loads: this file calls the installed package. Flower ships it from the server; sites do not check it."""

from fedgan_lightning.deployment.apps import client_app, server_app

client = client_app()
server = server_app()
