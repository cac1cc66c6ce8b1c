// A VM through JDBC, in and out of transactions: VmJdbc.java HOST PORT, which has to be TCP's. Prints what went as it should.
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.util.Arrays;
import java.util.UUID;

public class VmJdbc {
	static Connection db;

	static void check(boolean holds, Object what) {
		if (!holds)
			throw new AssertionError(what);
	}

	static PreparedStatement prepare(String sql, Object... values) throws SQLException {
		PreparedStatement statement = db.prepareStatement(sql);
		for (int i = 0; i < values.length; i++)
			statement.setObject(i + 1, values[i]);
		return statement;
	}

	static Object[] row(int columns, String sql, Object... values) throws SQLException {
		try (PreparedStatement statement = prepare(sql, values); ResultSet result = statement.executeQuery()) {
			Object[] row = new Object[columns];
			check(result.next(), "a row");
			for (int i = 0; i < columns; i++)
				row[i] = result.getObject(i + 1);
			return row;
		}
	}

	static Object value(String sql, Object... values) throws SQLException {
		return row(1, sql, values)[0];
	}

	static String sqlstate(String sql, Object... values) {
		try {
			value(sql, values);
			return "none";
		} catch (SQLException error) {
			return error.getSQLState();
		}
	}

	static void is(Object got, Object expected) {
		check(expected.equals(got), got + " is not " + expected);
	}

	public static void main(String[] args) throws SQLException {
		db = DriverManager.getConnection("jdbc:postgresql://" + args[0] + ":" + args[1] + "/postgres?user=app");

		// outside: JDBC commits each statement, unless told otherwise
		UUID vm = (UUID) value("SELECT agentvm.provision('acme', profile => 'micro', agent_id => 'jdbc')");
		try (PreparedStatement await = prepare("CALL agentvm.await(?)", vm)) {
			await.execute();
		}
		Object[] ran = row(3, "SELECT exit_code, stdout, stderr FROM agentvm.exec(?, 'echo out; echo err >&2; exit 7')", vm);
		check(Arrays.equals(ran, new Object[] {7, "out\n", "err\n"}), Arrays.toString(ran));
		byte[] bytes = {0, -1, 65, 10};
		is(value("SELECT agentvm.upload(?, '/tmp/it', ?)", vm, bytes), 4L);
		check(Arrays.equals((byte[]) value("SELECT agentvm.download(?, '/tmp/it')", vm), bytes), "the same bytes");
		System.out.println("outside");

		db.setAutoCommit(false);
		is(value("SELECT exit_code FROM agentvm.exec(?, 'echo kept >/tmp/kept')", vm), 0);
		UUID other = (UUID) value("SELECT agentvm.provision('acme', profile => 'micro')");
		db.rollback();
		is(new String((byte[]) value("SELECT agentvm.download(?, '/tmp/kept')", vm)), "kept\n");
		db.commit();
		System.out.println("inside");

		is(sqlstate("SELECT agentvm.exec(?, 'true')", other), "AV005");
		db.rollback();
		is(sqlstate("SELECT agentvm.download(?, '/nowhere')", vm), "58P01");
		db.rollback();
		is(value("SELECT agentvm.terminate(?)", vm), true);
		db.commit();
		is(sqlstate("SELECT agentvm.exec(?, 'true')", vm), "AV006");
		db.rollback();
		System.out.println("errors");
		db.close();
	}
}
