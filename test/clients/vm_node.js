// A VM through node-postgres, in and out of transactions: vm_node.js HOST PORT. Prints what went as it should.
const assert = require('assert');
const { Client } = require('pg');

const [host, port] = process.argv.slice(2);

async function main() {
	const db = new Client({ host, port: Number(port), user: 'app', database: 'postgres' });
	await db.connect();
	const one = async (sql, ...values) => (await db.query(sql, values)).rows[0];
	const sqlstate = async (sql, ...values) => db.query(sql, values).then(() => 'none', (error) => error.code);

	// outside: each statement by itself
	const { vm } = await one("SELECT agentvm.provision('acme', profile => 'micro', agent_id => 'node') AS vm");
	await db.query('CALL agentvm.await($1)', [vm]);
	const ran = await one("SELECT exit_code, stdout, stderr FROM agentvm.exec($1, 'echo out; echo err >&2; exit 7')", vm);
	assert.deepStrictEqual({ ...ran }, { exit_code: 7, stdout: 'out\n', stderr: 'err\n' });
	const bytes = Buffer.from([0, 255, 65, 10]);
	assert.strictEqual((await one("SELECT agentvm.upload($1, '/tmp/it', $2) AS n", vm, bytes)).n, '4');
	assert.deepStrictEqual((await one("SELECT agentvm.download($1, '/tmp/it') AS content", vm)).content, bytes);
	console.log('outside');

	await db.query('BEGIN');
	assert.strictEqual((await one("SELECT exit_code FROM agentvm.exec($1, 'echo kept >/tmp/kept')", vm)).exit_code, 0);
	const { other } = await one("SELECT agentvm.provision('acme', profile => 'micro') AS other");
	await db.query('ROLLBACK');
	await db.query('BEGIN');
	assert.strictEqual((await one("SELECT agentvm.download($1, '/tmp/kept') AS content", vm)).content.toString(), 'kept\n');
	await db.query('COMMIT');
	console.log('inside');

	assert.strictEqual(await sqlstate("SELECT agentvm.exec($1, 'true')", other), 'AV005');
	assert.strictEqual(await sqlstate("SELECT agentvm.download($1, '/nowhere')", vm), '58P01');
	await db.query('BEGIN');
	assert.strictEqual((await one('SELECT agentvm.terminate($1) AS begun', vm)).begun, true);
	await db.query('COMMIT');
	assert.strictEqual(await sqlstate("SELECT agentvm.exec($1, 'true')", vm), 'AV006');
	console.log('errors');
	await db.end();
}

main().catch((error) => {
	console.error(error);
	process.exit(1);
});
