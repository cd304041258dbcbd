"""What Flower loads: the installed package, nothing else. Sites run the code that they have installed and reviewed."""

from fedgan_lightning.deployment.apps import client_app, server_app

client = client_app()
server = server_app()
