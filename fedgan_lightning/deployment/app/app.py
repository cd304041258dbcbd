"""What Flower loads at the server: this file calls the installed package. Sites load what they have installed."""

from fedgan_lightning.deployment.apps import client_app, server_app

client = client_app()
server = server_app()
